# The Python whose packages bring libtorch and XLA's headers: the one that builds a wheel of ours, else
# that of .venv.
set(gateloop_python ${Python_EXECUTABLE})
if(NOT gateloop_python)
  set(gateloop_python ${PROJECT_SOURCE_DIR}/.venv/bin/python)
endif()
