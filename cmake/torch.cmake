# libtorch comes from a Python wheel unless -DTorch_DIR or CMAKE_PREFIX_PATH names another.
if(NOT Torch_DIR AND EXISTS ${gateloop_python})
  execute_process(
    COMMAND ${gateloop_python} -c "import torch; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE)
  list(APPEND CMAKE_PREFIX_PATH ${torch_prefix})
endif()
# Torch's package warns that it finds no kineto, which the wheel has inside libtorch_cpu.
set(kineto_LIBRARY inside)
# Torch with CUDA would run a program on the GPU to choose architectures, which cmake/cuda.cmake has
# chosen already, and it forgets them.
set(gateloop_cuda_architectures ${CMAKE_CUDA_ARCHITECTURES})
unset(CMAKE_CUDA_ARCHITECTURES)
if(NOT DEFINED TORCH_CUDA_ARCH_LIST AND NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  set(TORCH_CUDA_ARCH_LIST 9.0)
endif()
find_package(Torch REQUIRED)
set(CMAKE_CUDA_ARCHITECTURES ${gateloop_cuda_architectures})
# These two targets bring in all of libtorch. The absolute paths that Torch lists beside them would be
# written into the installed package.
set(TORCH_LIBRARIES torch torch_library)

# libtorch's headers take 15 s a file to parse; precompiled once, 6 s to load and instantiate. Every
# target that includes <torch/torch.h> calls gateloop_use_torch(target).
add_library(gateloop_torch_pch OBJECT ${CMAKE_CURRENT_LIST_DIR}/torch_pch.cpp)
target_link_libraries(gateloop_torch_pch PRIVATE ${TORCH_LIBRARIES})
target_precompile_headers(gateloop_torch_pch PRIVATE <torch/torch.h>)
# -Wpedantic changes a predefined macro (__cpp_runtime_arrays), so that it has to be the same here.
gateloop_warnings(gateloop_torch_pch)

function(gateloop_use_torch target)
  target_link_libraries(${target} PUBLIC ${TORCH_LIBRARIES})
  # A precompiled header fits only code compiled alike: executables too take -fPIC, not -fPIE.
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_compile_options(${target} PRIVATE -fPIC)
  target_precompile_headers(${target} REUSE_FROM gateloop_torch_pch)
endfunction()
