# cmake -DLIBRARY=FILE -DSTRIP=PROGRAM -DCOPY=FILE -P library.cmake: what the library needs of the
# system, and how large it is without symbols. LIMIT: bytes; 0 where sanitizers make it larger.
execute_process(COMMAND ldd ${LIBRARY} OUTPUT_VARIABLE needs COMMAND_ERROR_IS_FATAL ANY)
if(needs MATCHES "torch|python|gomp|hwy\\.so\\.[^1]")
  message(FATAL_ERROR "the runtime needs more than the system's libraries:\n${needs}")
endif()
execute_process(COMMAND ${STRIP} -o ${COPY} ${LIBRARY} COMMAND_ERROR_IS_FATAL ANY)
file(SIZE ${COPY} bytes)
message("${bytes} bytes stripped")
if(LIMIT AND bytes GREATER LIMIT)
  message(FATAL_ERROR "more than ${LIMIT}")
endif()
# Everything else is hidden; the interface takes arguments of these types.
execute_process(COMMAND nm -D --defined-only ${COPY} COMMAND c++filt OUTPUT_VARIABLE symbols
  COMMAND_ERROR_IS_FATAL ANY)
foreach(hidden gateloop::recurrence gateloop::model:: nlohmann)
  if(symbols MATCHES "[TWV] ${hidden}[^\n]*\n")
    message(FATAL_ERROR "visible, but no part of the interface: ${CMAKE_MATCH_0}")
  endif()
endforeach()
