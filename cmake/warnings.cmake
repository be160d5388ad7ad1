# Our own code compiles without a warning; other people's headers come in as system headers.
function(gateloop_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Werror)
endfunction()
