# LibTorch's stable ABI: headers and the two libraries that hold its symbols. find_package(Torch) would bring in CUDA, its
# own compiler flags and the unstable C++ interface, so the interpreter is asked for the folder instead. The libraries
# need no rpath: `import torch` has loaded them before the operators are.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT TORCH_ROOT)
  message(FATAL_ERROR "tilewright: ${Python_EXECUTABLE} has no torch; tilewright is built against torch >= 2.10")
endif()

file(STRINGS ${TORCH_ROOT}/version.py TORCH_VERSION REGEX "^__version__")
string(REGEX REPLACE ".*'([0-9]+\\.[0-9]+).*" "\\1" TORCH_VERSION "${TORCH_VERSION}")
if(TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "tilewright: torch >= 2.10 is needed, ${TORCH_ROOT} holds ${TORCH_VERSION}")
endif()
message(STATUS "tilewright: torch ${TORCH_VERSION} in ${TORCH_ROOT}")

add_library(tilewright_torch INTERFACE)
target_include_directories(tilewright_torch SYSTEM INTERFACE ${TORCH_ROOT}/include)
# The oldest torch that the binary must load into.
target_compile_definitions(tilewright_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_compile_options(tilewright_torch INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${TORCH_ROOT}/include/=>")
target_link_libraries(tilewright_torch INTERFACE ${TORCH_ROOT}/lib/libtorch_cpu.so ${TORCH_ROOT}/lib/libc10.so)
set(CMAKE_SKIP_RPATH ON)
