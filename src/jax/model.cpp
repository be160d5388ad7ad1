// src/model's description of a model, for ctypes: words in, words out.
#include "gateloop/model.h"

#include <exception>
#include <string>

#include "model/provenance.h"

namespace gateloop::jax {
namespace {

/// What `work` returns, or what its error says, in memory that lasts until the thread's next call.
template <typename Work>
const char* answer(bool* failed, const Work& work) noexcept {
  thread_local std::string text;
  *failed = true;
  try {
    try {
      text = work();
      *failed = false;
    } catch (const std::exception& error) {
      text = error.what();
    }
    return text.c_str();
  } catch (...) {  // the words of an error need memory too
    return "out of memory";
  }
}

}  // namespace
}  // namespace gateloop::jax

// Each returns UTF-8 text: the answer, or with `failed` what is wrong with the arguments.
#pragma GCC visibility push(default)
extern "C" {

/// model::describe().
const char* gateloop_jax_describe(const char* options, bool* failed) {
  return gateloop::jax::answer(failed, [&] { return gateloop::model::describe(options); });
}

/// The options as config.json holds them.
const char* gateloop_jax_stored_options(const char* options, bool* failed) {
  return gateloop::jax::answer(failed, [&] {
    return gateloop::model::to_json(gateloop::model::options_from_json(options));
  });
}

/// model::stored_problems().
const char* gateloop_jax_stored_problems(const char* options, const char* tensors, bool* failed) {
  return gateloop::jax::answer(failed,
                               [&] { return gateloop::model::stored_problems(options, tensors); });
}

/// The git revision that it was built from, "" outside of a checkout.
const char* gateloop_jax_revision(bool* failed) {
  return gateloop::jax::answer(failed, [] { return gateloop::model::kRevision; });
}

}  // extern "C"
#pragma GCC visibility pop
