# The CUDA backend, where a compiler for it is found: sets KG_CUDA, target keelgrad_cuda, KG_CUDA_OBJECTS and KG_CUDART.
# Without one the addon has no CUDA backend, and a line says so; nothing else changes.
#
# Environment: KEELGRAD_CUDA=0 leaves it out, =1 makes its absence an error. nvcc is looked for in CUDA_HOME, CUDA_PATH,
# PATH, /usr/local/cuda and pip's folders (nvidia/cu13).

set(KG_LEAST_NVCC 12.0)

# One line for who builds; an error where CUDA is asked for.
macro(keelgrad_without_cuda why)
  set(KG_CUDA OFF)
  if("$ENV{KEELGRAD_CUDA}" STREQUAL "1")
    message(FATAL_ERROR "keelgrad: KEELGRAD_CUDA=1, but ${why}")
  endif()
  message(NOTICE "keelgrad: building without CUDA: ${why}")
endmacro()

# Folders of pip packages: of the active virtual environment, of python3, of the user.
function(keelgrad_pip_toolkits result)
  execute_process(COMMAND python3 -c "import site, sysconfig
print(';'.join([sysconfig.get_paths()['purelib'], site.getusersitepackages()]))"
    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  file(GLOB found "$ENV{VIRTUAL_ENV}/lib/python3*/site-packages/nvidia/cu13")
  foreach(folder IN LISTS folders)
    list(APPEND found "${folder}/nvidia/cu13")
  endforeach()
  set(${result} ${found} PARENT_SCOPE)
endfunction()

function(keelgrad_find_nvcc)
  if(KG_NVCC AND NOT EXISTS "${KG_NVCC}")
    unset(KG_NVCC CACHE)
  endif()
  find_program(KG_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin /opt/cuda/bin)
  if(NOT KG_NVCC)
    keelgrad_pip_toolkits(toolkits)
    list(TRANSFORM toolkits APPEND /bin)
    find_program(KG_NVCC nvcc PATHS ${toolkits})
  endif()
endfunction()

# Compiles one kernel and finds what it is linked with: a toolkit may be there in part. Sets `result` to what is missing.
function(keelgrad_try_nvcc result)
  set(${result} "" PARENT_SCOPE)
  set(probe ${CMAKE_BINARY_DIR}/cuda_probe)
  file(WRITE ${probe}.cu "#include <cuda_runtime.h>\n__global__ void k(int* x) { *x = 1; }\nvoid f() { k<<<1, 1>>>(0); }\n")
  execute_process(COMMAND ${KG_NVCC} -std=c++17 -arch=sm_80 -c ${probe}.cu -o ${probe}.o
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    string(STRIP "${output}" output)
    string(REGEX REPLACE "\n.*" "" output "${output}")
    set(${result} "${KG_NVCC} does not compile: ${output}" PARENT_SCOPE)
    return()
  endif()
  get_filename_component(bin ${KG_NVCC} REALPATH)
  get_filename_component(bin ${bin} DIRECTORY)
  get_filename_component(root ${bin} DIRECTORY)
  find_library(KG_CUDART NAMES libcudart_static.a NO_DEFAULT_PATH
    PATHS ${root}/lib ${root}/lib64 ${root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib ${root}/targets/sbsa-linux/lib)
  find_path(KG_CUDA_INCLUDE cuda_runtime_api.h NO_DEFAULT_PATH
    PATHS ${root}/include ${root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include ${root}/targets/sbsa-linux/include)
  if(NOT KG_CUDART OR NOT KG_CUDA_INCLUDE)
    set(${result} "${root} has no libcudart_static.a or cuda_runtime_api.h" PARENT_SCOPE)
  endif()
endfunction()

if("$ENV{KEELGRAD_CUDA}" STREQUAL "0")
  keelgrad_without_cuda("KEELGRAD_CUDA=0")
  return()
endif()
keelgrad_find_nvcc()
if(NOT KG_NVCC)
  keelgrad_without_cuda("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
  return()
endif()
execute_process(COMMAND ${KG_NVCC} --version OUTPUT_VARIABLE KG_NVCC_VERSION ERROR_QUIET)
string(REGEX REPLACE ".*release ([0-9]+\\.[0-9]+).*" "\\1" KG_NVCC_VERSION "${KG_NVCC_VERSION}")
if(NOT KG_NVCC_VERSION MATCHES "^[0-9.]+$")
  keelgrad_without_cuda("${KG_NVCC} does not tell its version")
  return()
elseif(KG_NVCC_VERSION VERSION_LESS KG_LEAST_NVCC)
  keelgrad_without_cuda("${KG_NVCC} is of CUDA ${KG_NVCC_VERSION}, expected ${KG_LEAST_NVCC} or later")
  return()
endif()
keelgrad_try_nvcc(KG_CUDA_MISSING)
if(KG_CUDA_MISSING)
  keelgrad_without_cuda("${KG_CUDA_MISSING}")
  return()
endif()

set(KG_CUDA ON)

# Machine code for every kind of GPU that nvcc knows, and PTX for those to come. All but sm_90a, which takes only its own,
# share the PTX of compute_80: making one takes as long as machine code for a GPU, and no kernel asks what it runs on.
set(KG_CUDA_CODES sm_80 sm_86 sm_89)
set(KG_CUDA_NAMES "sm_80 sm_86 sm_89 sm_90a")
if(NOT KG_NVCC_VERSION VERSION_LESS 12.8)
  list(APPEND KG_CUDA_CODES sm_100 sm_120)
  string(APPEND KG_CUDA_NAMES " sm_100 sm_120")
endif()
list(JOIN KG_CUDA_CODES "," codes)
set(KG_CUDA_TARGETS "arch=compute_80,code=[compute_80,${codes}]" "arch=compute_90a,code=sm_90a")
list(TRANSFORM KG_CUDA_TARGETS PREPEND "-gencode=")
set(KG_CUDA_FLAGS -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -I${CMAKE_SOURCE_DIR}/native
  --threads=2 -Xfatbin=-compress-all ${KG_CUDA_TARGETS})

# nvcc is called by commands of our own: CMake's CUDA language stops the whole build where a toolkit is incomplete or, as
# pip's, laid out another way.
file(GLOB KG_CUDA_KERNELS CONFIGURE_DEPENDS native/cuda/*.cu)
file(GLOB KG_CUDA_HOST CONFIGURE_DEPENDS native/cuda/*.cc)
file(GLOB KG_CUDA_HEADERS CONFIGURE_DEPENDS native/cuda/*.h native/ops/* native/runtime/*.h)
set(KG_CUDA_OBJECTS)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)
foreach(source IN LISTS KG_CUDA_KERNELS)
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.cu.o)
  if(POLICY CMP0116)  # CMake 3.20: knows the headers of each file
    cmake_policy(SET CMP0116 NEW)
    set(depends DEPFILE ${object}.d)
  else()
    set(depends DEPENDS ${KG_CUDA_HEADERS})
  endif()
  add_custom_command(OUTPUT ${object} COMMENT "nvcc ${name}.cu" VERBATIM
    COMMAND ${CMAKE_COMMAND} -E rm -f ${object}.csv  # nvcc appends the times of its phases
    COMMAND ${KG_NVCC} --time ${object}.csv -ccbin ${CMAKE_CXX_COMPILER} ${KG_CUDA_FLAGS} -MD -MF ${object}.d -c ${source} -o ${object}
    MAIN_DEPENDENCY ${source} ${depends})
  list(APPEND KG_CUDA_OBJECTS ${object})
endforeach()

add_library(keelgrad_cuda OBJECT ${KG_CUDA_HOST})
target_include_directories(keelgrad_cuda PRIVATE native)
target_include_directories(keelgrad_cuda SYSTEM PRIVATE ${KG_CUDA_INCLUDE})
target_compile_definitions(keelgrad_cuda PRIVATE KG_CUDA)
target_compile_options(keelgrad_cuda PRIVATE -O2 -Wall -Wextra)

message(NOTICE "keelgrad: building with CUDA ${KG_NVCC_VERSION} (${KG_NVCC}) for ${KG_CUDA_NAMES} and PTX")
