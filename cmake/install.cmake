# cmake --install: the libraries, the public headers, and a CMake package "gateloop" with the targets
# gateloop::recurrence and gateloop::runtime, with nvcc gateloop::recurrence_cuda, and with libtorch
# gateloop::ops and gateloop::torch.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/gateloop)

foreach(header recurrence model runtime generation gateloop)
  install(FILES ${PROJECT_SOURCE_DIR}/include/gateloop/${header}.h
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/gateloop)
endforeach()
# An export set each: who uses the runtime alone need not have Highway, nor who uses the recurrence
# libtorch.
target_compile_features(gateloop_runtime PUBLIC cxx_std_20)
install(TARGETS gateloop_runtime EXPORT gateloop-runtime)
install(EXPORT gateloop-runtime NAMESPACE gateloop:: DESTINATION ${package_dir})
target_compile_features(gateloop_recurrence PUBLIC cxx_std_20)
target_compile_features(gateloop_model PUBLIC cxx_std_20)
install(TARGETS gateloop_recurrence gateloop_model EXPORT gateloop-recurrence)
install(EXPORT gateloop-recurrence NAMESPACE gateloop:: DESTINATION ${package_dir})
if(TARGET gateloop_recurrence_cuda)
  install(FILES ${PROJECT_SOURCE_DIR}/include/gateloop/recurrence_cuda.h
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/gateloop)
  target_compile_features(gateloop_recurrence_cuda PUBLIC cxx_std_20)
  install(TARGETS gateloop_recurrence_cuda EXPORT gateloop-cuda)
  install(EXPORT gateloop-cuda NAMESPACE gateloop:: DESTINATION ${package_dir})
endif()

if(GATELOOP_TORCH)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
    PATTERN recurrence_cuda.h EXCLUDE)
  target_compile_features(gateloop_ops PUBLIC cxx_std_20)
  install(TARGETS gateloop_ops gateloop_torch EXPORT gateloop-torch)
  install(EXPORT gateloop-torch NAMESPACE gateloop:: DESTINATION ${package_dir})
  # Our own libraries are found beside the program wherever the tree is moved to; libtorch where it
  # was when this was built. (Its directory is named here because CMake does not see it: Torch's
  # targets pass libraries to the linker as flags.)
  set_target_properties(gateloop-train gateloop_ops gateloop_torch PROPERTIES
    INSTALL_RPATH "$ORIGIN;$ORIGIN/../${CMAKE_INSTALL_LIBDIR};${TORCH_INSTALL_PREFIX}/lib")
endif()

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/gateloop-config.cmake.in
  ${PROJECT_BINARY_DIR}/gateloop-config.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may break its users.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/gateloop-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/gateloop-config.cmake
  ${PROJECT_BINARY_DIR}/gateloop-config-version.cmake DESTINATION ${package_dir})
