// What does not fit is refused by name; what is damaged never crashes.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <new>
#include <string>

#include "gateloop/gateloop.h"
#include "gateloop/generation.h"
#include "gateloop/runtime.h"
#include "model/digest.h"
#include "model/file.h"
#include "model/safetensors.h"
#include "models.h"
#include "temporary_directory.h"

namespace gateloop::test {
namespace {

using runtime::Format;
using runtime::Model;
using runtime::Session;
using runtime::State;

class Errors : public testing::Test {
 protected:
  Errors() : spec(model::resolve(options)), weights(random_weights(spec, random)) {
    std::filesystem::create_directory(model_dir);
    write_model(model_dir, options, weights);
  }
  Model open() const { return Model(model_dir); }

  std::mt19937_64 random{std::mt19937_64(1)};
  const TemporaryDirectory dir;
  const std::string model_dir = dir / "model";
  const model::ModelOptions options = case_of("window").options;  // and max heads
  const model::ModelSpec spec;
  Weights weights;
};

template <class Error>
void expect_error(const std::function<void()>& f, const std::string& text) {
  try {
    f();
    ADD_FAILURE() << "nothing thrown, expected: " << text;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST_F(Errors, OfArgumentsNameWhatWasExpectedAndWhatCame) {
  Session session(open());
  const auto expect = [&](const std::function<void()>& f, const std::string& text) {
    expect_error<std::invalid_argument>(f, text);
  };
  using Ids = std::vector<std::int64_t>;
  expect([&] { session.prefill(Ids{0, 37}); }, "prefill: ids must be in [0, 37), got 37");
  expect([&] { session.step(Ids{-1}); }, "step: ids must be in [0, 37), got -1");
  expect([&] { session.prefill(Ids{}); }, "T >= 1, got 0 ids");
  expect([&] { session.step(Ids{}); }, "got 0 ids");
  expect([&] { session.prefill(Ids{1, 2, 3}, 2); }, "B = 2 and T >= 1, got 3 ids");
  expect([&] { session.read_all(Ids{1}, 0); }, "read_all: batch must be positive, got 0");
  session.prefill(Ids{1, 2}, 2);
  expect([&] { session.step(Ids{1}); }, "step: the state is of 2 sequences, got 1");
  expect([&] { Session(open(), {.threads = -1}); }, "threads must be in [0, 1024], got -1");
  expect([&] { Session(open(), {.chunk = 0}); }, "chunk must be positive, got 0");
  const std::vector<std::uint8_t> text{1, 2, 37};
  expect([&] { runtime::evaluate(session, text); }, "must be in [0, 37), got 37");
  expect([&] { runtime::evaluate(session, std::span(text).first(1)); }, "got 1");
  expect([&] { runtime::evaluate(session, text, {.window = -1}); },
         "window must be at least 0, got -1");
  const auto cuts = [&](const Ids& cu_seqlens, const std::string& got) {
    expect(
        [&] {
          session.prefill_packed(Ids{1, 2, 3}, cu_seqlens);
        },
        "prefill_packed: cu_seqlens must rise from 0 to the count of ids, 3, got " + got);
  };
  cuts({}, "0 numbers");
  cuts({0}, "1 numbers");
  cuts({1, 2, 3}, "1 to 3");
  cuts({0, 1, 4}, "0 to 4");
  cuts({0, 2, 2, 3}, "2 after 2");
  cuts({0, 2, 1, 3}, "1 after 2");
  expect([&] { session.prefill_packed(Ids{1, 2, 3}, Ids{0, 3}); }, "is of 2 sequences, got 1");
  expect([&] { session.prefill_packed(Ids{1, 2, 37}, Ids{0, 1, 3}); }, "got 37");
  std::vector<float> room(3);
  expect(
      [&] {
        session.read_all_packed(Ids{1, 2, 3}, Ids{0, 1, 3}, room);
      },
      "read_all_packed: logits must have room for 111 numbers, got 3");
  const State state = session.state();
  expect([&] { state.select(Ids{0, 2}); }, "sequences must be in [0, 2), got 2");
  expect([&] { state.select(Ids{-1}); }, "got -1");
  expect([&] { State::join(std::vector<State>{state, {}}); }, "got one with none");
  generation::Sampler sampler({}, 0);
  expect([&] { sampler.read_packed(Ids{1, 2}, Ids{0, 3}); }, "Sampler::read_packed: cu_seqlens");
  expect([&] { sampler.read(Ids{1, -2, 3}, 3); }, "Sampler::read: ids must be in [0, ");
  EXPECT_EQ(sampler.draw(std::vector<float>{1, 2}, 1).size(), 1);  // of another batch
  // What was refused has left the state as it was.
  EXPECT_EQ(session.state().position(), 1);
}

TEST_F(Errors, OfStatesOfOtherModels) {
  Session session(open());
  session.prefill(random_ids(spec, 5, random));
  const State state = session.state();
  Weights other = random_weights(spec, random);
  std::filesystem::create_directory(dir / "other");
  write_model(dir / "other", options, other);
  Session another{Model(dir / "other")};
  expect_error<std::invalid_argument>([&] { another.set_state(state); }, "another model");
  another.prefill(random_ids(spec, 5, random));
  const std::vector<State> both = {state, another.state()};
  expect_error<std::invalid_argument>([&] { State::join(both); }, "of one model, got two models'");
}

TEST_F(Errors, OfModelsNameTheFile) {
  const auto expect = [&](const std::function<void()>& f, const std::string& text) {
    expect_error<std::runtime_error>(f, text);
  };
  expect([&] { Model(dir / "nowhere"); }, "no model there");
  expect([&] { Model(model_dir, {.weights = model::Weights::kBest}); }, "best");
  model::save_text(model_dir + "/config.json", "{\"format\": 1, \"model\": {\"dim\": 25}}");
  expect([&] { open(); }, "unexpected");
  model::save_text(model_dir + "/config.json", "{\"format\": 1, \"model\": {\"depth\": \"x\"}}");
  expect([&] { open(); }, "depth");
}

TEST_F(Errors, OfInt8WithoutFittingScales) {
  const auto write = [&](std::vector<std::int64_t> scale_shape, const std::string& scale_dtype,
                         const std::string& dtype) {
    const std::vector<char> zeros(1 << 20);
    std::vector<model::TensorBytes> tensors;
    for (const model::Weight& weight : model::weight_table(spec)) {
      const bool is_first = weight.name == "token_emb.weight";
      tensors.push_back({weight.name, is_first ? dtype : "F32", weight.shape, zeros.data()});
    }
    if (!scale_dtype.empty())
      tensors.push_back({"token_emb.weight.scale", scale_dtype, scale_shape, zeros.data()});
    model::write_safetensors(model_dir + "/model.safetensors", tensors, {});
  };
  const auto expect = [&](const std::string& text) {
    expect_error<std::runtime_error>([&] { open(); }, text);
  };
  const std::string needs = "token_emb.weight is I8 and needs token_emb.weight.scale, F32 (37)";
  write({37}, "F32", "I8");
  EXPECT_NO_THROW(open());
  write({36}, "F32", "I8");
  expect(needs);
  write({37, 1}, "F32", "I8");
  expect(needs);
  write({37}, "F16", "I8");
  expect(needs);
  write({}, "", "I8");
  expect(needs);
  write({37}, "F32", "F32");
  expect("unexpected token_emb.weight.scale");
  write({}, "", "I64");
  expect("token_emb.weight is I64, not F64, F32, F16, BF16 or I8");
  write({}, "", "F8_E4M3");
  expect("token_emb.weight is F8_E4M3, not F64, F32, F16, BF16 or I8");
}

/// Without waiting for the disk, as save_text does: these files are written thousands of times.
void write(const std::string& file, const std::string& bytes) {
  std::filesystem::remove(file);  // some file systems flush what replaces an old content
  std::ofstream(file, std::ios::binary) << bytes;
}

/// Cuts, flips, grows.
std::string damaged(std::string bytes, std::mt19937_64& random) {
  const auto at = [&] { return random() % bytes.size(); };
  switch (random() % 4) {
    case 0:
      bytes.resize(at());
      break;
    case 1:
      bytes[at()] ^= static_cast<char>(1u << random() % 8);
      break;
    case 2:
      bytes[at() % std::min<std::size_t>(bytes.size(), 200)] = static_cast<char>(random());
      break;
    default:
      bytes.insert(at(), std::string(1 + random() % 16, static_cast<char>(random())));
  }
  return bytes;
}

/// A state's file with the checksum of its bytes.
std::string with_checksum(std::string bytes) {
  if (bytes.size() < sizeof(std::uint64_t)) return bytes;
  model::Digest digest;
  digest.add(bytes.data(), bytes.size() - sizeof(std::uint64_t));
  const std::uint64_t checksum = digest.value();
  std::memcpy(bytes.data() + bytes.size() - sizeof checksum, &checksum, sizeof checksum);
  return bytes;
}

TEST_F(Errors, OfDamagedStates) {
  Session session(open());
  session.prefill(random_ids(spec, 9, random));
  const std::string file = dir / "state";
  session.state().save(file);
  const std::string bytes = model::read_text(file);
  for (int i = 0; i < 2000; ++i) {
    const std::string broken = damaged(bytes, random);
    if (broken == bytes) continue;
    write(file, broken);
    EXPECT_THROW(session.set_state(State::load(file)), std::runtime_error) << "damage " << i;
  }
  // With a checksum that fits, as an attacker's has: refused, or read without a fault.
  int read = 0;
  for (int i = 0; i < 4000; ++i) {
    write(file, with_checksum(damaged(bytes, random)));
    try {
      session.set_state(State::load(file));
      const std::int64_t batch = session.state().batch();
      if (batch > 0 && batch < 100) session.prefill(random_ids(spec, 2 * batch, random), batch);
      ++read;
    } catch (const std::runtime_error&) {
    } catch (const std::invalid_argument&) {
    }
  }
  EXPECT_GT(read, 100);
  model::save_text(file, "");
  expect_error<std::runtime_error>([&] { State::load(file); }, "truncated");
  expect_error<std::runtime_error>([&] { State::load(dir / "nowhere"); }, "nowhere");
  std::string version = bytes;
  version[8] = 9;
  model::save_text(file, version);
  expect_error<std::runtime_error>([&] { State::load(file); },
                                   "version 9; this library reads versions 1 to 2");
  version[0] = 'X';
  model::save_text(file, version);
  expect_error<std::runtime_error>([&] { State::load(file); }, "not a state of a session");
}

constexpr std::size_t kVersionAt = 8, kBatchAt = 24, kPositionAt = 32, kPositionsAt = 40;

TEST_F(Errors, OfStatesWhoseSizesAreNotTheModels) {
  Session session(open());
  session.prefill(random_ids(spec, 3, random));
  const std::string file = dir / "state";
  session.state().save(file);
  const std::string bytes = model::read_text(file);
  const auto put = [](std::string& to, std::size_t at, std::int64_t value) {
    std::memcpy(to.data() + at, &value, sizeof value);
  };
  for (const std::int64_t position : {std::int64_t{4}, std::int64_t{1} << 32}) {
    std::string other = bytes;
    put(other, kPositionAt, position);
    put(other, kPositionsAt, position);
    model::save_text(file, with_checksum(other));
    const State state = State::load(file);
    expect_error<std::invalid_argument>([&] { session.set_state(state); }, "has other sizes");
    put(other, kPositionAt, position - 1);
    model::save_text(file, with_checksum(other));
    expect_error<std::runtime_error>([&] { State::load(file); }, "its positions are impossible");
  }
  for (const std::int64_t batch : {std::int64_t{2}, std::int64_t{1} << 32}) {
    std::string other = bytes;
    put(other, kBatchAt, batch);
    model::save_text(file, with_checksum(other));
    EXPECT_ANY_THROW(session.set_state(State::load(file)));
  }
}

/// Whose keys and values are of other sizes, at a position that needs none.
TEST_F(Errors, OfStatesWithKeysOfOthersAtTheStart) {
  Session session(open());
  session.prefill(random_ids(spec, 3, random));
  const std::string file = dir / "state";
  session.state().save(file);
  std::string bytes = model::read_text(file);
  const auto at = [&](std::size_t offset) {
    std::int64_t number = 0;
    std::memcpy(&number, bytes.data() + offset, sizeof number);
    return number;
  };
  const auto put = [&](std::size_t offset, std::int64_t number) {
    std::memcpy(bytes.data() + offset, &number, sizeof number);
  };
  put(kPositionAt, 0);
  put(kPositionsAt, 0);
  // Rows, steps and channels of the layer with keys: as many numbers in one row of one channel.
  constexpr std::size_t kSizes = 48, kRows = 16;
  const std::size_t layer = kSizes + (at(kSizes + kRows) > 0 ? 0 : 40);
  put(layer + kRows + 8, at(layer + kRows) * at(layer + kRows + 8) * at(layer + kRows + 16));
  put(layer + kRows, 1);
  put(layer + kRows + 16, 1);
  model::save_text(file, with_checksum(bytes));
  const State state = State::load(file);
  expect_error<std::invalid_argument>([&] { session.set_state(state); }, "has other sizes");
}

TEST_F(Errors, OfSpecsThatCannotBe) {
  model::ModelSpec other = spec;
  std::get<model::AttentionSpec>(other.layers[0].mixer).window = 0;
  EXPECT_THROW(Model(other, {}, nullptr), std::invalid_argument);
  other = spec;
  std::get<model::GateLoopSpec>(other.layers[1].mixer).heads = 0;
  EXPECT_THROW(Model(other, {}, nullptr), std::invalid_argument);
}

TEST_F(Errors, OfStatesThatNoMachineHasRoomFor) {
  model::ModelOptions wide = case_of("taylor").options;
  wide.num_tokens = 3;
  wide.dim = 1;
  wide.layer_pattern = "gate_loop";
  wide.layers.clear();
  wide.depth = 1;
  wide.gate_loop_heads = 1;
  wide.feature_map = model::FeatureMap::kTaylor;
  wide.gate_loop_dim_key = 6000;
  wide.dim_gate_looped_attn = 1 << 16;
  Weights large = random_weights(model::resolve(wide), random);
  std::filesystem::create_directory(dir / "wide");
  write_model(dir / "wide", wide, large);
  Session session{Model(dir / "wide")};
  expect_error<std::runtime_error>([&] { session.step(std::vector<std::int64_t>{1}); },
                                   "Session: states of 1 sequences take ");
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
/// In a process that gets no more memory.
TEST_F(Errors, OfMemoryLeaveTheStartOfASequence) {
  const auto ids = random_ids(spec, 2 << 16, random);
  const auto run = [&] {
    Session session(open(), {.threads = 1, .chunk = 2 << 16});
    session.prefill(std::span(ids).first(8), 2);
    const rlimit none{1 << 20, 1 << 20};
    ::setrlimit(RLIMIT_AS, &none);
    try {
      session.prefill(ids, 2);
    } catch (const std::bad_alloc&) {
      std::_Exit(session.position() == 0 && session.state().batch() == 0 ? 0 : 2);
    }
    std::_Exit(3);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(0), "");
}
#endif

TEST_F(Errors, StatesOfVersion1AreRead) {
  Session session(open());
  session.prefill(random_ids(spec, 8, random), 2);
  const std::string file = dir / "state";
  session.state().save(file);
  std::string bytes = model::read_text(file);
  bytes[kVersionAt] = 1;
  bytes.erase(kPositionsAt, 2 * sizeof(std::int64_t));
  model::save_text(file, with_checksum(bytes));
  const auto next = random_ids(spec, 2, random);
  const State state = State::load(file);
  EXPECT_EQ(state.positions(), (std::vector<std::int64_t>{4, 4}));
  const auto read = session.step(next);
  const std::vector<float> expected(read.begin(), read.end());
  session.set_state(state);
  const auto again = session.step(next);
  EXPECT_EQ(std::vector<float>(again.begin(), again.end()), expected);
}

TEST_F(Errors, OfDamagedModels) {
  std::filesystem::create_directory(dir / "int8");
  runtime::quantize(model_dir, dir / "int8", Format::kInt8);
  const auto ids = random_ids(spec, 6, random);
  for (const char* name : {"model.safetensors", "config.json"}) {
    const std::string file = dir / "int8" / name;
    const std::string bytes = model::read_text(file);
    for (int i = 0; i < 400; ++i) {
      write(file, damaged(bytes, random));
      try {
        Session session{Model(dir / "int8")};  // numbers alone may have changed
        session.prefill(ids, 2);
      } catch (const std::runtime_error&) {
      } catch (const std::invalid_argument&) {  // ids outside of another vocabulary
      }
    }
    model::save_text(file, bytes);
  }
  EXPECT_NO_THROW(Model(dir / "int8"));
}

TEST_F(Errors, OfTheCInterfaceAreStatuses) {
  gateloop_model* model = nullptr;
  const std::string nowhere = dir / "nowhere";
  EXPECT_EQ(gateloop_model_open(nowhere.c_str(), 0, GATELOOP_FILE, &model), GATELOOP_FAILED);
  EXPECT_EQ(model, nullptr);
  EXPECT_NE(std::string(gateloop_last_error()).find("no model there"), std::string::npos);
  EXPECT_EQ(gateloop_model_open(nullptr, 0, GATELOOP_FILE, &model), GATELOOP_INVALID_ARGUMENT);
  EXPECT_STREQ(gateloop_last_error(), "gateloop_model_open: dir must not be NULL");
  EXPECT_EQ(gateloop_model_open("", 0, static_cast<gateloop_format>(7), &model),
            GATELOOP_INVALID_ARGUMENT);
  ASSERT_EQ(gateloop_model_open(model_dir.c_str(), 0, GATELOOP_INT8, &model), GATELOOP_OK);
  gateloop_session* session = nullptr;
  ASSERT_EQ(gateloop_session_new(model, 2, &session), GATELOOP_OK);
  gateloop_model_free(model);
  const std::int64_t id = 99;
  EXPECT_EQ(gateloop_step(session, &id, 1, nullptr), GATELOOP_INVALID_ARGUMENT);
  EXPECT_EQ(gateloop_step(session, nullptr, 1, nullptr), GATELOOP_INVALID_ARGUMENT);
  EXPECT_EQ(gateloop_prefill(session, &id, INT64_MAX, 2, nullptr), GATELOOP_INVALID_ARGUMENT);
  const std::int64_t cuts[] = {0, 0};
  for (const std::int64_t batch : {-1, 0, 1}) {
    EXPECT_EQ(gateloop_prefill_packed(session, &id, cuts, batch, nullptr),
              GATELOOP_INVALID_ARGUMENT);
  }
  gateloop_state* made = nullptr;
  EXPECT_EQ(gateloop_state_select(nullptr, &id, 1, &made), GATELOOP_INVALID_ARGUMENT);
  EXPECT_EQ(gateloop_state_join(nullptr, 1, &made), GATELOOP_INVALID_ARGUMENT);
  const gateloop_state* const none[] = {nullptr};
  EXPECT_EQ(gateloop_state_join(none, 1, &made), GATELOOP_INVALID_ARGUMENT);
  EXPECT_STREQ(gateloop_last_error(), "gateloop_state_join: states must not be NULL");
  gateloop_session_free(session);
  gateloop_model_free(nullptr);
}

TEST_F(Errors, CGivesWhatCppGives) {
  const auto ids = random_ids(spec, 12, random);
  Session expected(open(), {.threads = 2});
  gateloop_model* model = nullptr;
  gateloop_session* session = nullptr;
  ASSERT_EQ(gateloop_model_open(model_dir.c_str(), 0, GATELOOP_FILE, &model), GATELOOP_OK);
  EXPECT_EQ(gateloop_model_num_tokens(model), 37);
  ASSERT_EQ(gateloop_session_new(model, 2, &session), GATELOOP_OK);
  const float* logits = nullptr;
  const auto same = [&](std::span<const float> by_cpp) {
    return std::equal(by_cpp.begin(), by_cpp.end(), logits);
  };
  ASSERT_EQ(gateloop_prefill(session, ids.data(), 2, 6, &logits), GATELOOP_OK);
  EXPECT_TRUE(same(expected.prefill(ids, 2)));

  gateloop_state *state = nullptr, *copy = nullptr, *loaded = nullptr;
  const std::string file = dir / "state";
  ASSERT_EQ(gateloop_session_state(session, &state), GATELOOP_OK);
  ASSERT_EQ(gateloop_state_copy(state, &copy), GATELOOP_OK);
  gateloop_state_free(state);
  ASSERT_EQ(gateloop_state_save(copy, file.c_str()), GATELOOP_OK);
  ASSERT_EQ(gateloop_state_load(file.c_str(), &loaded), GATELOOP_OK);
  EXPECT_EQ(gateloop_state_position(loaded), 6);
  EXPECT_EQ(gateloop_state_bytes(loaded), expected.state().bytes());
  const auto next = expected.step(std::span(ids).first(2));
  for (gateloop_state* from : {copy, loaded}) {
    ASSERT_EQ(gateloop_session_set_state(session, from), GATELOOP_OK);
    ASSERT_EQ(gateloop_step(session, ids.data(), 2, &logits), GATELOOP_OK);
    EXPECT_TRUE(same(next));
    gateloop_state_free(from);
  }

  ASSERT_EQ(gateloop_session_set_state(session, nullptr), GATELOOP_OK);
  expected.set_state({});
  std::vector<float> all(12 * 37);
  ASSERT_EQ(gateloop_read_all(session, ids.data(), 2, 6, all.data()), GATELOOP_OK);
  EXPECT_EQ(all, expected.read_all(ids, 2));

  const std::int64_t cuts[] = {0, 3, 4, 12}, chosen[] = {2, 0};
  ASSERT_EQ(gateloop_session_set_state(session, nullptr), GATELOOP_OK);
  expected.restart();
  std::vector<float> by_cpp(12 * 37);
  ASSERT_EQ(gateloop_read_all_packed(session, ids.data(), cuts, 3, all.data()), GATELOOP_OK);
  expected.read_all_packed(ids, cuts, by_cpp);
  EXPECT_EQ(all, by_cpp);
  ASSERT_EQ(gateloop_session_set_state(session, nullptr), GATELOOP_OK);
  expected.restart();
  ASSERT_EQ(gateloop_prefill_packed(session, ids.data(), cuts, 3, &logits), GATELOOP_OK);
  EXPECT_TRUE(same(expected.prefill_packed(ids, cuts)));
  gateloop_state *selected = nullptr, *joined = nullptr;
  ASSERT_EQ(gateloop_session_state(session, &state), GATELOOP_OK);
  ASSERT_EQ(gateloop_state_select(state, chosen, 2, &selected), GATELOOP_OK);
  const gateloop_state* const parts[] = {selected, state};
  ASSERT_EQ(gateloop_state_join(parts, 2, &joined), GATELOOP_OK);
  EXPECT_EQ(gateloop_state_batch(joined), 5);
  EXPECT_EQ(gateloop_state_position(joined), 8);
  std::vector<std::int64_t> positions(5);
  ASSERT_EQ(gateloop_state_positions(joined, positions.data()), GATELOOP_OK);
  EXPECT_EQ(positions, (std::vector<std::int64_t>{8, 3, 3, 1, 8}));
  const State three = expected.state();
  expected.set_state(State::join(std::vector<State>{three.select(chosen), three}));
  ASSERT_EQ(gateloop_session_set_state(session, joined), GATELOOP_OK);
  ASSERT_EQ(gateloop_step(session, ids.data(), 5, &logits), GATELOOP_OK);
  EXPECT_TRUE(same(expected.step(std::span(ids).first(5))));
  for (gateloop_state* const old : {state, selected, joined}) gateloop_state_free(old);
  gateloop_session_free(session);
  gateloop_model_free(model);
  EXPECT_STREQ(gateloop_version(), "0.1.0");
}

}  // namespace
}  // namespace gateloop::test
