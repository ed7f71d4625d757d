# TILEWRIGHT_KERNEL_ID says which sources a binary, or a recorded result, speaks of: the first 16 hex digits of
#     (cd csrc && find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum) | sha256sum
file(GLOB_RECURSE TILEWRIGHT_SOURCES CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}/csrc
  ${CMAKE_CURRENT_SOURCE_DIR}/csrc/*)
list(SORT TILEWRIGHT_SOURCES COMPARE STRING)
set(KERNEL_ID_LINES "")
foreach(SOURCE IN LISTS TILEWRIGHT_SOURCES)
  file(SHA256 ${CMAKE_CURRENT_SOURCE_DIR}/csrc/${SOURCE} SOURCE_HASH)
  string(APPEND KERNEL_ID_LINES "${SOURCE_HASH}  ./${SOURCE}\n")
  # A changed source changes the id, so it must run the configure step again.
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/${SOURCE})
endforeach()
string(SHA256 TILEWRIGHT_KERNEL_ID "${KERNEL_ID_LINES}")
string(SUBSTRING ${TILEWRIGHT_KERNEL_ID} 0 16 TILEWRIGHT_KERNEL_ID)
message(STATUS "tilewright: kernel id ${TILEWRIGHT_KERNEL_ID}")
