/* embed_c DIR: continues a text by the likeliest bytes. */
#include <gateloop/gateloop.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(gateloop_status status) {
  if (status == GATELOOP_OK) return;
  fprintf(stderr, "embed_c: %s\n", gateloop_last_error());
  exit(1);
}

static int64_t likeliest(const float* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

int main(int argc, char** argv) {
  const char* text = "The quick brown fox";
  int64_t ids[64];
  const int64_t count = (int64_t)strlen(text);
  for (int64_t i = 0; i < count; ++i) ids[i] = (unsigned char)text[i];
  if (argc != 2) {
    fprintf(stderr, "usage: embed_c DIR\n");
    return 2;
  }

  gateloop_model* model;
  gateloop_session* session;
  gateloop_state* state;
  const float* logits;
  check(gateloop_model_open(argv[1], 0, GATELOOP_FILE, &model));
  check(gateloop_session_new(model, 0, &session));
  check(gateloop_prefill(session, ids, 1, count, &logits));
  fputs(text, stdout);
  for (int i = 0; i < 16; ++i) {
    const int64_t next = likeliest(logits, gateloop_model_num_tokens(model));
    putchar((int)next);
    check(gateloop_step(session, &next, 1, &logits));
  }
  check(gateloop_session_state(session, &state));
  printf("\n16 bytes more from a state of %" PRId64 " bytes\n", gateloop_state_bytes(state));
  gateloop_state_free(state);
  gateloop_session_free(session);
  gateloop_model_free(model);
  return 0;
}
