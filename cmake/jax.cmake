# XLA's headers come with jaxlib. Leaves GATELOOP_XLA_INCLUDE, empty where that Python has no jax.
if(NOT GATELOOP_XLA_INCLUDE AND EXISTS ${gateloop_python})
  execute_process(COMMAND ${gateloop_python} -c "import jax.ffi; print(jax.ffi.include_dir())"
    OUTPUT_VARIABLE GATELOOP_XLA_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT GATELOOP_XLA_INCLUDE)
  set(no_jax "no jax in ${gateloop_python}: libgateloop_jax, and its tests, are left out")
  if(NOT GATELOOP_JAX STREQUAL AUTO)
    message(FATAL_ERROR "GATELOOP_JAX=${GATELOOP_JAX}, but ${no_jax}")
  endif()
  message(STATUS "GateLoop: ${no_jax}")
endif()
