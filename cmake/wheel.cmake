# The wheel of gateloop-cpp (pyproject.toml): the operators' library beside its modules, and nothing else.
include(cmake/torch.cmake)
add_subdirectory(src/ops)
install(TARGETS gateloop_ops LIBRARY DESTINATION gateloop_cpp)
# torch has loaded its libraries before ours; the path serves who loads ours alone.
set_target_properties(gateloop_ops PROPERTIES INSTALL_RPATH "$ORIGIN/../torch/lib")
