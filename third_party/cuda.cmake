# Finds nvcc and enables CUDA for sm_90a. Sets TILEWRIGHT_WITH_CUDA, TILEWRIGHT_CUDA_VERSION, TILEWRIGHT_ARCHS.
#
# nvcc is looked for on PATH, in CUDA_HOME, and where PyPI's nvidia-cuda-nvcc puts it (nvidia/cu13 since CUDA 13,
# nvidia/cuda_nvcc before). The CUDA runtime is linked statically: the binary then needs nothing but the driver, whatever
# CUDA the user's torch was built with.
set(TILEWRIGHT_WITH_CUDA OFF)
set(TILEWRIGHT_CUDA_VERSION "")
set(TILEWRIGHT_ARCHS "")
if(TILEWRIGHT_CUDA STREQUAL "OFF")
  message(STATUS "tilewright: TILEWRIGHT_CUDA=OFF, building the CPU operators only")
  return()
endif()

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations) if s else '')"
  OUTPUT_VARIABLE NVIDIA_ROOTS OUTPUT_STRIP_TRAILING_WHITESPACE)
list(TRANSFORM NVIDIA_ROOTS APPEND /cu13/bin OUTPUT_VARIABLE NVIDIA_CU13_BIN)
list(TRANSFORM NVIDIA_ROOTS APPEND /cuda_nvcc/bin OUTPUT_VARIABLE NVIDIA_CUDA_NVCC_BIN)
find_program(TILEWRIGHT_NVCC nvcc
  NO_DEFAULT_PATH
  HINTS ENV PATH
  PATHS $ENV{CUDA_HOME}/bin ${NVIDIA_CU13_BIN} ${NVIDIA_CUDA_NVCC_BIN} /usr/local/cuda/bin)

if(NOT TILEWRIGHT_NVCC)
  if(TILEWRIGHT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "tilewright: TILEWRIGHT_CUDA=ON, but nvcc is neither on PATH, nor in CUDA_HOME, nor installed from PyPI")
  endif()
  message(WARNING "tilewright: no nvcc on PATH, in CUDA_HOME or from PyPI's nvidia-cuda-nvcc: building the CPU operators ONLY")
  return()
endif()

set(CMAKE_CUDA_COMPILER ${TILEWRIGHT_NVCC})
set(CMAKE_CUDA_ARCHITECTURES 90a-real)  # no PTX: wgmma exists on Hopper alone
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
# nvcc looks for its libraries in lib64; PyPI's packages have them in lib.
get_filename_component(NVCC_ROOT ${TILEWRIGHT_NVCC} DIRECTORY)
get_filename_component(NVCC_ROOT ${NVCC_ROOT} DIRECTORY)
if(EXISTS ${NVCC_ROOT}/lib/libcudart_static.a AND NOT EXISTS ${NVCC_ROOT}/lib64)
  string(APPEND CMAKE_CUDA_FLAGS " -L${NVCC_ROOT}/lib")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "tilewright: CUDA >= 12.4 is needed, ${TILEWRIGHT_NVCC} is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
# The runtime for what g++ compiles. find_package(CUDAToolkit) would ask for a libcudart.so, which PyPI does not have.
find_library(TILEWRIGHT_CUDART cudart_static NO_DEFAULT_PATH REQUIRED
  PATHS ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${NVCC_ROOT}/lib)
find_package(Threads REQUIRED)
add_library(tilewright_cudart INTERFACE)
target_include_directories(tilewright_cudart SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(tilewright_cudart INTERFACE ${TILEWRIGHT_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
set(TILEWRIGHT_WITH_CUDA ON)
set(TILEWRIGHT_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
set(TILEWRIGHT_ARCHS "sm_90a")
message(STATUS "tilewright: nvcc ${TILEWRIGHT_CUDA_VERSION} (${TILEWRIGHT_NVCC}), building CPU and CUDA operators for ${TILEWRIGHT_ARCHS}")
