# Our own code compiles without a warning; other people's headers come in as system headers.
function(gateloop_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Werror)
  # Of sources compiled together GCC takes each for a header of several.
  target_compile_options(${target} PRIVATE
    $<$<AND:$<BOOL:${GATELOOP_UNITY}>,$<CXX_COMPILER_ID:GNU>>:-Wno-subobject-linkage>)
endfunction()
