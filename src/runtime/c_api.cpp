// The C interface: objects behind opaque pointers, exceptions to statuses.
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "gateloop/gateloop.h"
#include "gateloop/runtime.h"

using gateloop::runtime::Format;
using gateloop::runtime::Model;
using gateloop::runtime::Session;
using gateloop::runtime::State;

struct gateloop_model {
  Model model;
};
struct gateloop_session {
  Session session;
};
struct gateloop_state {
  State state;
};

namespace {

std::string& last_error() {
  thread_local std::string error;
  return error;
}

gateloop_status fail(gateloop_status status, const char* problem) {
  try {
    last_error() = problem;
  } catch (const std::bad_alloc&) {
    last_error().clear();
  }
  return status;
}

/// f() with what it throws as a status.
template <class F>
gateloop_status guarded(const F& f) {
  try {
    f();
    return GATELOOP_OK;
  } catch (const std::invalid_argument& error) {
    return fail(GATELOOP_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return fail(GATELOOP_FAILED, error.what());
  } catch (...) {
    return fail(GATELOOP_FAILED, "unknown error");
  }
}

template <class T>
T& checked(T* pointer, const char* function, const char* argument) {
  if (pointer == nullptr)
    throw std::invalid_argument(std::string(function) + ": " + argument + " must not be NULL");
  return *pointer;
}

Format format_of(gateloop_format format, const char* function) {
  const auto value = static_cast<unsigned>(format);
  if (value > static_cast<unsigned>(Format::kInt8))
    throw std::invalid_argument(std::string(function) + ": format must be in [0, 4], got " +
                                std::to_string(static_cast<int>(format)));
  return static_cast<Format>(value);
}

/// ids (batch, time).
std::span<const std::int64_t> ids_of(const std::int64_t* ids, std::int64_t batch, std::int64_t time,
                                     const char* function) {
  std::int64_t count = 0;
  if (batch < 1 || time < 1 || __builtin_mul_overflow(batch, time, &count))
    throw std::invalid_argument(std::string(function) +
                                ": ids must be (B, T) with B, T >= 1, got " +
                                std::to_string(batch) + " and " + std::to_string(time));
  return {&checked(ids, function, "ids"), static_cast<std::size_t>(count)};
}

/// `count` values behind a pointer.
template <typename T>
std::span<const T> values_of(const T* values, std::int64_t count, const char* function,
                             const char* argument) {
  if (count < 1)
    throw std::invalid_argument(std::string(function) + ": count of " + argument +
                                " must be positive, got " + std::to_string(count));
  return {&checked(values, function, argument), static_cast<std::size_t>(count)};
}

/// Where `batch` packed sequences begin and end.
std::span<const std::int64_t> cuts_of(const std::int64_t* cu_seqlens, std::int64_t batch,
                                      const char* function) {
  return {values_of(cu_seqlens, batch, function, "cu_seqlens").data(),
          static_cast<std::size_t>(batch) + 1};
}

}  // namespace

const char* gateloop_version(void) { return GATELOOP_VERSION; }
const char* gateloop_last_error(void) { return last_error().c_str(); }

gateloop_status gateloop_model_open(const char* dir, int best, gateloop_format format,
                                    gateloop_model** model) {
  return guarded([&] {
    const char* name = "gateloop_model_open";
    checked(model, name, "model") = nullptr;
    const auto weights =
        best != 0 ? gateloop::model::Weights::kBest : gateloop::model::Weights::kLatest;
    *model = new gateloop_model{
        Model(&checked(dir, name, "dir"), {.weights = weights, .format = format_of(format, name)})};
  });
}
void gateloop_model_free(gateloop_model* model) { delete model; }
int64_t gateloop_model_num_tokens(const gateloop_model* model) {
  return model == nullptr ? 0 : model->model.spec().num_tokens;
}

gateloop_status gateloop_quantize(const char* from, const char* to, gateloop_format format) {
  return guarded([&] {
    const char* name = "gateloop_quantize";
    gateloop::runtime::quantize(&checked(from, name, "from"), &checked(to, name, "to"),
                                format_of(format, name));
  });
}

gateloop_status gateloop_session_new(const gateloop_model* model, int threads,
                                     gateloop_session** session) {
  return guarded([&] {
    const char* name = "gateloop_session_new";
    checked(session, name, "session") = nullptr;
    *session =
        new gateloop_session{Session(checked(model, name, "model").model, {.threads = threads})};
  });
}
void gateloop_session_free(gateloop_session* session) { delete session; }

gateloop_status gateloop_prefill(gateloop_session* session, const int64_t* ids, int64_t batch,
                                 int64_t time, const float** logits) {
  return guarded([&] {
    const char* name = "gateloop_prefill";
    const auto read =
        checked(session, name, "session").session.prefill(ids_of(ids, batch, time, name), batch);
    if (logits != nullptr) *logits = read.data();
  });
}
gateloop_status gateloop_prefill_packed(gateloop_session* session, const int64_t* ids,
                                        const int64_t* cu_seqlens, int64_t batch,
                                        const float** logits) {
  return guarded([&] {
    const char* name = "gateloop_prefill_packed";
    const auto cuts = cuts_of(cu_seqlens, batch, name);
    const auto packed = values_of(ids, cuts.back(), name, "ids");
    const auto read = checked(session, name, "session").session.prefill_packed(packed, cuts);
    if (logits != nullptr) *logits = read.data();
  });
}
gateloop_status gateloop_read_all_packed(gateloop_session* session, const int64_t* ids,
                                         const int64_t* cu_seqlens, int64_t batch, float* logits) {
  return guarded([&] {
    const char* name = "gateloop_read_all_packed";
    Session& reader = checked(session, name, "session").session;
    const auto cuts = cuts_of(cu_seqlens, batch, name);
    const auto packed = values_of(ids, cuts.back(), name, "ids");
    const auto width = static_cast<std::size_t>(reader.model().spec().num_tokens);
    reader.read_all_packed(packed, cuts, {&checked(logits, name, "logits"), packed.size() * width});
  });
}
gateloop_status gateloop_step(gateloop_session* session, const int64_t* ids, int64_t batch,
                              const float** logits) {
  return gateloop_prefill(session, ids, batch, 1, logits);
}
gateloop_status gateloop_read_all(gateloop_session* session, const int64_t* ids, int64_t batch,
                                  int64_t time, float* logits) {
  return guarded([&] {
    const char* name = "gateloop_read_all";
    Session& reader = checked(session, name, "session").session;
    const auto read = ids_of(ids, batch, time, name);
    const auto width = static_cast<std::size_t>(reader.model().spec().num_tokens);
    reader.read_all(read, batch, {&checked(logits, name, "logits"), read.size() * width});
  });
}

gateloop_status gateloop_session_state(const gateloop_session* session, gateloop_state** state) {
  return guarded([&] {
    const char* name = "gateloop_session_state";
    checked(state, name, "state") = nullptr;
    *state = new gateloop_state{checked(session, name, "session").session.state()};
  });
}
gateloop_status gateloop_session_set_state(gateloop_session* session, const gateloop_state* state) {
  return guarded([&] {
    checked(session, "gateloop_session_set_state", "session")
        .session.set_state(state == nullptr ? State() : state->state);
  });
}
gateloop_status gateloop_state_copy(const gateloop_state* state, gateloop_state** copy) {
  return guarded([&] {
    const char* name = "gateloop_state_copy";
    checked(copy, name, "copy") = nullptr;
    *copy = new gateloop_state{checked(state, name, "state").state};
  });
}
gateloop_status gateloop_state_select(const gateloop_state* state, const int64_t* sequences,
                                      int64_t count, gateloop_state** selected) {
  return guarded([&] {
    const char* name = "gateloop_state_select";
    checked(selected, name, "selected") = nullptr;
    const auto chosen = values_of(sequences, count, name, "sequences");
    *selected = new gateloop_state{checked(state, name, "state").state.select(chosen)};
  });
}
gateloop_status gateloop_state_join(const gateloop_state* const* states, int64_t count,
                                    gateloop_state** joined) {
  return guarded([&] {
    const char* name = "gateloop_state_join";
    checked(joined, name, "joined") = nullptr;
    std::vector<State> parts;
    for (const gateloop_state* const part : values_of(states, count, name, "states"))
      parts.push_back(checked(part, name, "states").state);
    *joined = new gateloop_state{State::join(parts)};
  });
}
gateloop_status gateloop_state_save(const gateloop_state* state, const char* file) {
  return guarded([&] {
    const char* name = "gateloop_state_save";
    checked(state, name, "state").state.save(&checked(file, name, "file"));
  });
}
gateloop_status gateloop_state_load(const char* file, gateloop_state** state) {
  return guarded([&] {
    const char* name = "gateloop_state_load";
    checked(state, name, "state") = nullptr;
    *state = new gateloop_state{State::load(&checked(file, name, "file"))};
  });
}
int64_t gateloop_state_batch(const gateloop_state* state) {
  return state == nullptr ? 0 : state->state.batch();
}
int64_t gateloop_state_position(const gateloop_state* state) {
  return state == nullptr ? 0 : state->state.position();
}
gateloop_status gateloop_state_positions(const gateloop_state* state, int64_t* positions) {
  return guarded([&] {
    const char* name = "gateloop_state_positions";
    const auto all = checked(state, name, "state").state.positions();
    std::copy(all.begin(), all.end(), &checked(positions, name, "positions"));
  });
}
int64_t gateloop_state_bytes(const gateloop_state* state) {
  return state == nullptr ? 0 : state->state.bytes();
}
void gateloop_state_free(gateloop_state* state) { delete state; }
