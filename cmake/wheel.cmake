# What a wheel holds: one library beside its modules, and nothing else.
if(GATELOOP_TORCH)  # gateloop-cpp, pyproject.toml
  add_subdirectory(src/runtime)
  include(cmake/torch.cmake)
  add_subdirectory(src/ops)
  install(TARGETS gateloop_ops LIBRARY DESTINATION gateloop_cpp)
  # torch has loaded its libraries before ours; the path serves who loads ours alone.
  set_target_properties(gateloop_ops PROPERTIES INSTALL_RPATH "$ORIGIN/../torch/lib")
else()  # gateloop-jax, python/gateloop_jax/pyproject.toml
  include(cmake/jax.cmake)
  add_subdirectory(src/jax)
  install(TARGETS gateloop_jax LIBRARY DESTINATION gateloop_jax)
endif()
