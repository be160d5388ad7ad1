# cmake -DSOURCE=DIR -DVERSION=V -DOUTPUT=FILE -P revision.cmake: writes FILE, which defines the
# version and the git revision of the tree, where they change. The revision is empty where the tree is not a git checkout of its own.
get_filename_component(above ${SOURCE} DIRECTORY)
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env GIT_CEILING_DIRECTORIES=${above}
    git -C ${SOURCE} describe --always --dirty --abbrev=12 --exclude=*
  OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(revision "")
endif()
file(CONFIGURE OUTPUT ${OUTPUT} @ONLY CONTENT [[
namespace gateloop::model {
extern const char* const kVersion;
extern const char* const kRevision;
const char* const kVersion = "@VERSION@";
const char* const kRevision = "@revision@";
}  // namespace gateloop::model
]])
