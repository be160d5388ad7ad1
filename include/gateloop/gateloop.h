#ifndef GATELOOP_GATELOOP_H_
#define GATELOOP_GATELOOP_H_

/* Inference with GateLoop models from C, or anything that calls C: gateloop/runtime.h has the same
 * for C++.
 *
 * Functions that can fail return a status; gateloop_last_error() then says, for the calling thread,
 * what was expected and what came. A session serves one caller at a time; distinct sessions and
 * states may be used in distinct threads at once, and a model by any. Objects made here are freed
 * by the function of their name; NULL is freed without effect. */
/* NOLINTBEGIN(readability-identifier-naming,modernize-*): this is C. */
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GATELOOP_C_API __attribute__((visibility("default")))

typedef enum gateloop_status {
  GATELOOP_OK = 0,
  GATELOOP_INVALID_ARGUMENT = 1, /* an argument does not fit */
  GATELOOP_FAILED = 2            /* a file or the system: damaged, not there, no memory */
} gateloop_status;

/* Of matrices; see gateloop::runtime::Format. */
typedef enum gateloop_format {
  GATELOOP_FILE = 0,
  GATELOOP_FLOAT32 = 1,
  GATELOOP_BFLOAT16 = 2,
  GATELOOP_FLOAT16 = 3,
  GATELOOP_INT8 = 4
} gateloop_format;

typedef struct gateloop_model gateloop_model;
typedef struct gateloop_session gateloop_session;
typedef struct gateloop_state gateloop_state;

/* "MAJOR.MINOR.PATCH". */
GATELOOP_C_API const char* gateloop_version(void);
/* Of the calling thread's last call that failed; "" before the first. Valid until its next. */
GATELOOP_C_API const char* gateloop_last_error(void);

/* Opens DIR/model.safetensors, or model.best.safetensors if `best`. */
GATELOOP_C_API gateloop_status gateloop_model_open(const char* dir, int best,
                                                   gateloop_format format, gateloop_model** model);
/* Sessions keep what they need of it. */
GATELOOP_C_API void gateloop_model_free(gateloop_model* model);
GATELOOP_C_API int64_t gateloop_model_num_tokens(const gateloop_model* model);
/* Writes the models of a directory to another one, in another format. */
GATELOOP_C_API gateloop_status gateloop_quantize(const char* from, const char* to,
                                                 gateloop_format format);

/* `threads`: 0 for every processor that this process may use. */
GATELOOP_C_API gateloop_status gateloop_session_new(const gateloop_model* model, int threads,
                                                    gateloop_session** session);
GATELOOP_C_API void gateloop_session_free(gateloop_session* session);
/* Reads ids, (batch, time) in one piece. *logits: (batch, num_tokens), of the token after the last,
 * valid until the session's next call; `logits` may be NULL. */
GATELOOP_C_API gateloop_status gateloop_prefill(gateloop_session* session, const int64_t* ids,
                                                int64_t batch, int64_t time, const float** logits);
/* The same for sequences of different lengths, packed one after another: sequence b reads ids
 * [cu_seqlens[b], cu_seqlens[b + 1]), at least one. cu_seqlens: batch + 1 numbers, the first 0. */
GATELOOP_C_API gateloop_status gateloop_prefill_packed(gateloop_session* session,
                                                       const int64_t* ids,
                                                       const int64_t* cu_seqlens, int64_t batch,
                                                       const float** logits);
/* The same for one token of each sequence: ids (batch). */
GATELOOP_C_API gateloop_status gateloop_step(gateloop_session* session, const int64_t* ids,
                                             int64_t batch, const float** logits);
/* The same for the logits after every token: logits (batch, time, num_tokens) is written. */
GATELOOP_C_API gateloop_status gateloop_read_all(gateloop_session* session, const int64_t* ids,
                                                 int64_t batch, int64_t time, float* logits);

/* The same for packed sequences: logits (cu_seqlens[batch], num_tokens). */
GATELOOP_C_API gateloop_status gateloop_read_all_packed(gateloop_session* session,
                                                        const int64_t* ids,
                                                        const int64_t* cu_seqlens, int64_t batch,
                                                        float* logits);

/* A copy of what the session has read. */
GATELOOP_C_API gateloop_status gateloop_session_state(const gateloop_session* session,
                                                      gateloop_state** state);
/* Goes on from a copy of `state`; from the start of a sequence where it is NULL. */
GATELOOP_C_API gateloop_status gateloop_session_set_state(gateloop_session* session,
                                                          const gateloop_state* state);
GATELOOP_C_API gateloop_status gateloop_state_copy(const gateloop_state* state,
                                                   gateloop_state** copy);
/* The state of `count` of its sequences, in the order given; one may come several times. */
GATELOOP_C_API gateloop_status gateloop_state_select(const gateloop_state* state,
                                                     const int64_t* sequences, int64_t count,
                                                     gateloop_state** selected);
/* The state of all sequences of `count` states of one model, one after another. */
GATELOOP_C_API gateloop_status gateloop_state_join(const gateloop_state* const* states,
                                                   int64_t count, gateloop_state** joined);
GATELOOP_C_API gateloop_status gateloop_state_save(const gateloop_state* state, const char* file);
GATELOOP_C_API gateloop_status gateloop_state_load(const char* file, gateloop_state** state);
/* Sequences; 0 before the first token. */
GATELOOP_C_API int64_t gateloop_state_batch(const gateloop_state* state);
/* Tokens read of each sequence, of the longest where they differ. */
GATELOOP_C_API int64_t gateloop_state_position(const gateloop_state* state);
/* Of each: positions (batch) is written. */
GATELOOP_C_API gateloop_status gateloop_state_positions(const gateloop_state* state,
                                                        int64_t* positions);
GATELOOP_C_API int64_t gateloop_state_bytes(const gateloop_state* state);
GATELOOP_C_API void gateloop_state_free(gateloop_state* state);

#ifdef __cplusplus
}
#endif
/* NOLINTEND(readability-identifier-naming,modernize-*) */

#endif /* GATELOOP_GATELOOP_H_ */
