# What is built, and the flags that every target is built with.

option(TANDEM_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(TANDEM_BUILD_CLI "Build the tandem command" ${PROJECT_IS_TOP_LEVEL})
option(TANDEM_BUILD_BENCH "Build the benchmarks" ${PROJECT_IS_TOP_LEVEL})
option(TANDEM_BUILD_EXAMPLES "Build the examples" ${PROJECT_IS_TOP_LEVEL})
set(TANDEM_CUDA AUTO CACHE STRING "Build the CUDA plugin: AUTO (where nvcc is found), ON or OFF")
option(TANDEM_CUDA_FAST_COMPILE "Compile CUDA code in an eighth of the time, to slow kernels: for \
machines without a GPU (nvcc 13)" OFF)
set(TANDEM_ONEDNN AUTO CACHE STRING "Build the onednn.cpu kernel: AUTO (where found), ON or OFF")
set(TANDEM_SANITIZE "" CACHE STRING "Sanitizers of every target, for example address,undefined")
foreach(choice TANDEM_CUDA TANDEM_ONEDNN)
  set_property(CACHE ${choice} PROPERTY STRINGS AUTO ON OFF)
  if(NOT ${choice} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "${choice} is \"${${choice}}\"; it may be AUTO, ON or OFF")
  endif()
endforeach()

get_property(is_multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(NOT CMAKE_BUILD_TYPE AND NOT is_multi_config)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
endif()

set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# Executables find the library in the tree that they were installed to, wherever that is moved.
file(RELATIVE_PATH bin_to_lib ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
set(CMAKE_INSTALL_RPATH "$ORIGIN/${bin_to_lib}")

# The flags of every target of this project. No flag that assumes finite maths is used anywhere:
# NaN and infinities have a meaning here.
add_library(tandem_warnings INTERFACE)
target_compile_options(
  tandem_warnings INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Werror>
                            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Werror>)

# The project's own headers: "core/mask.h" from the root, "tandem/tandem.h" as users see it.
add_library(tandem_headers INTERFACE)
target_include_directories(tandem_headers INTERFACE ${PROJECT_SOURCE_DIR}
                                                    ${PROJECT_SOURCE_DIR}/core/include)

if(TANDEM_SANITIZE)
  set(sanitize -fsanitize=${TANDEM_SANITIZE} -fno-omit-frame-pointer)
  if(TANDEM_SANITIZE MATCHES "undefined")
    list(APPEND sanitize -fno-sanitize-recover=undefined)
  endif()
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${sanitize}>")
  add_link_options("$<$<LINK_LANGUAGE:C,CXX>:${sanitize}>")
endif()

# The checks that take the compiler longest: of every address before it is used, and of scopes, of
# which every inlined function opens some. Vector code goes without them, and the programs that expand
# the templates of GoogleTest, RapidCheck and CLI11.
set(tandem_sanitize_less "")
if(TANDEM_SANITIZE MATCHES "address")
  set(tandem_sanitize_less -fno-sanitize=null,alignment,object-size,pointer-overflow,vptr
                           -fno-sanitize-address-use-after-scope)
endif()
