#pragma once

/// Inference without torch: a model read from its directory, and sessions that read tokens and give
/// logits. What a session carries from token to token is a value.
///
/// Shapes: B batch, T time, D channels. Arguments that do not fit are std::invalid_argument, files
/// that are not there or damaged std::runtime_error; both name what was expected and what came.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gateloop/model.h"

#define GATELOOP_RUNTIME_API __attribute__((visibility("default")))

namespace gateloop::runtime {

/// Of the matrices and the embedding; biases, gains and rotary frequencies are float32.
enum class Format : std::uint8_t {
  kFile,  ///< as the file has them: float32, bfloat16, float16 or int8; float64 becomes float32
  kFloat32,
  kBFloat16,  ///< matrix products round their inputs to it too, as torch's do
  kFloat16,
  kInt8,  ///< symmetric, one float32 scale for each row
};

struct OpenOptions {
  model::Weights weights = model::Weights::kLatest;
  Format format = Format::kFile;
};

/// A weight in memory, contiguous: its name in a state_dict, and "F64", "F32", "BF16", "F16" or
/// "I8". The last is of a matrix NAME (rows, columns) beside its scales NAME.scale (rows) in "F32".
struct StoredWeight {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
};

class Network;
struct StateData;

/// The weights of a model, read-only. Copies share them, and sessions in any threads may too.
///
/// The file is mapped: processes that open one file share its memory. Only what is stored in
/// another format than `options` name is copied. Replacing the file by a rename is safe; writing
/// into it while it is open is not.
class GATELOOP_RUNTIME_API Model {
 public:
  /// `dir`: config.json and model.safetensors, or model.best.safetensors.
  explicit Model(const std::filesystem::path& dir, const OpenOptions& options = {});

  /// Weights in the memory of `owner`, which the model holds as long as it lives; they must not
  /// change meanwhile. Throws std::invalid_argument naming every weight that does not fit.
  Model(const model::ModelSpec& spec, const std::vector<StoredWeight>& weights,
        std::shared_ptr<const void> owner, Format format = Format::kFile);

  const model::ModelSpec& spec() const;
  /// Of a model from a directory; nothing of one in memory.
  const std::optional<model::ModelOptions>& options() const;
  /// As the file or the caller has them, whatever the format; by name. Their memory is the model's,
  /// read-only, and there as long as a copy of the model is.
  std::vector<StoredWeight> weights() const;
  /// Of the spec and every byte of weights(), 16 hexadecimal digits. Reads all of them.
  std::string checksum() const;
  /// Bytes of all weights as products read them.
  std::int64_t weight_bytes() const;
  /// Bytes of them that this process has a copy of.
  std::int64_t copied_bytes() const;

 private:
  friend class Session;
  std::shared_ptr<const Network> network_;
};

/// What B sequences carry from token to token. Sessions that go on from copies of one state give
/// what each would give alone. Default-constructed: the start of a sequence.
class GATELOOP_RUNTIME_API State {
 public:
  State();
  State(const State&);
  State(State&&) noexcept;
  State& operator=(State) noexcept;
  ~State();

  std::int64_t batch() const;     ///< sequences; 0 before the first token
  std::int64_t position() const;  ///< tokens read of each, of the longest where they differ
  std::vector<std::int64_t> positions() const;  ///< (B) tokens read
  /// The state of some of its sequences, in the order given; one may come several times. Throws
  /// std::invalid_argument for a number outside [0, B), and for none.
  State select(std::span<const std::int64_t> sequences) const;
  /// The state of all sequences of some states of one model, one after another. Throws
  /// std::invalid_argument for states of two models, for one that has read nothing, and for none.
  static State join(std::span<const State> states);
  /// Memory of all sequences together; constant without full attention.
  std::int64_t bytes() const;

  /// Replaces the file as a whole, or leaves it as it was.
  void save(const std::filesystem::path& file) const;
  /// Throws std::runtime_error for a file of another format or version, or a damaged one.
  static State load(const std::filesystem::path& file);

 private:
  friend class Session;
  const StateData& data() const;
  std::unique_ptr<StateData> data_;
};

struct SessionOptions {
  int threads = 0;  ///< 0: every processor that this process may use
  /// Tokens of all sequences together that pass through the layers at once. It bounds the memory of
  /// long inputs; results are the same up to rounding.
  std::int64_t chunk = 1024;
};

/// What evaluate() and generation::generate() read tokens with: a Session on the CPU, or modules on
/// any device (nn::ModuleReader). It carries B sequences of equal length from call to call.
class GATELOOP_RUNTIME_API Reader {
 public:
  virtual ~Reader();

  virtual const model::ModelSpec& spec() const = 0;
  /// Reads `ids`, (B, T) with T ≥ 1. Returns the logits of the token after the last, (B,
  /// num_tokens), valid until the next call.
  virtual std::span<const float> prefill(std::span<const std::int64_t> ids,
                                         std::int64_t batch = 1) = 0;
  /// Reads `ids`, (B, T). Returns the sum of -ln p(next) in nats, where `next`, (B, T), is the
  /// token after each.
  virtual double surprise(std::span<const std::int64_t> ids, std::span<const std::int64_t> next,
                          std::int64_t batch = 1) = 0;
  /// The next tokens begin sequences.
  virtual void restart() = 0;
  virtual std::int64_t position() const = 0;     ///< tokens read of each sequence
  virtual std::int64_t state_bytes() const = 0;  ///< memory of what is carried

 protected:
  Reader() = default;
  Reader(const Reader&) = default;
  Reader& operator=(const Reader&) = default;

  /// Throws std::invalid_argument naming `function` for `ids` that are not (B, T) in [0,
  /// num_tokens). `of_state`: the B of the state, which ids must have too; 0 before the first
  /// token.
  static void check_ids(const char* function, std::span<const std::int64_t> ids, std::int64_t batch,
                        std::int64_t of_state, std::int64_t num_tokens);
  /// The same for what surprise() predicts after `ids`.
  static void check_next(std::span<const std::int64_t> next, std::span<const std::int64_t> ids,
                         std::int64_t num_tokens);
};

/// Reads tokens of B sequences, which may have come to different positions. A session has threads
/// of its own and serves one caller at a time; distinct sessions may be used in distinct threads at
/// once. Results are the same bits for any number of threads. Where memory runs out while it reads
/// (std::bad_alloc), the next tokens begin sequences.
class GATELOOP_RUNTIME_API Session final : public Reader {
 public:
  explicit Session(Model model, const SessionOptions& options = {});
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session() override;

  const model::ModelSpec& spec() const override;
  std::span<const float> prefill(std::span<const std::int64_t> ids,
                                 std::int64_t batch = 1) override;
  std::span<const float> prefill(std::span<const std::int32_t> ids, std::int64_t batch = 1);
  /// The same for one token of each sequence: ids (B).
  std::span<const float> step(std::span<const std::int64_t> ids);
  std::span<const float> step(std::span<const std::int32_t> ids);
  /// The same for sequences of different lengths, packed one after another: sequence b reads ids
  /// [cu_seqlens[b], cu_seqlens[b + 1]), at least one. cu_seqlens: B + 1 numbers, from 0 to the
  /// count of ids.
  std::span<const float> prefill_packed(std::span<const std::int64_t> ids,
                                        std::span<const std::int64_t> cu_seqlens);
  /// Reads `ids`, (B, T), and returns the logits after every token, (B, T, num_tokens).
  std::vector<float> read_all(std::span<const std::int64_t> ids, std::int64_t batch = 1);
  /// The same into `logits`, of just that size.
  void read_all(std::span<const std::int64_t> ids, std::int64_t batch, std::span<float> logits);
  /// The same for packed sequences: logits (count of ids, num_tokens).
  void read_all_packed(std::span<const std::int64_t> ids, std::span<const std::int64_t> cu_seqlens,
                       std::span<float> logits);
  double surprise(std::span<const std::int64_t> ids, std::span<const std::int64_t> next,
                  std::int64_t batch = 1) override;
  void restart() override;
  std::int64_t position() const override;
  std::int64_t state_bytes() const override;

  const Model& model() const;
  int threads() const;
  /// A copy of what the tokens read so far have left.
  State state() const;
  /// The same, moved out: the next tokens begin sequences. The session that goes on from it writes
  /// keys and values in place, unless another state shares them.
  State take_state();
  /// Goes on from a state of this model; State() starts anew.
  void set_state(State state);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Total surprise and the number of bytes it was summed over.
struct Score {
  double nats = 0;         ///< sum of -ln p(byte | what the model read before it)
  std::int64_t bytes = 0;  ///< bytes predicted
  GATELOOP_RUNTIME_API double bits_per_byte() const;
};

struct EvaluateOptions {
  /// The state starts anew after every so many bytes; 0: it is carried through the whole text.
  std::int64_t window = 0;
  /// Byte that begins a document: the state starts anew before each, in a window too.
  std::optional<std::uint8_t> separator = {};
  /// Bytes of one pass, which bounds the memory: windows are batched up to it.
  std::int64_t bytes_at_once = 8192;
  /// Called after each pass with the bytes predicted so far and in all.
  std::function<void(std::int64_t done, std::int64_t total)> progress = {};
};

/// Predicts all of a text but its first byte, each byte once, in windows or as one stream: the two
/// figures differ by what context beyond a window is worth. With full attention and no window the
/// cost grows with the square of the text. The reader's state is replaced. Throws
/// std::invalid_argument for a text shorter than 2 bytes, a byte outside the vocabulary, or options
/// outside their range.
GATELOOP_RUNTIME_API Score evaluate(Reader& reader, std::span<const std::uint8_t> text,
                                    const EvaluateOptions& options = {});

/// Bytes of a text that are read from the start of a state; each predicts the byte after it.
struct Stretch {
  std::int64_t start = 0;
  std::int64_t length = 0;
};

/// What evaluate() reads: all of a text but its last byte, in its order, cut after every `window`
/// bytes and before each separator. Throws as evaluate() for a text or a window of another size.
GATELOOP_RUNTIME_API std::vector<Stretch> stretches(std::span<const std::uint8_t> text,
                                                    const EvaluateOptions& options);

/// evaluate() of some of the stretches of a text. `progress` counts their bytes.
GATELOOP_RUNTIME_API Score evaluate_stretches(Reader& reader, std::span<const std::uint8_t> text,
                                              std::vector<Stretch> stretches,
                                              const EvaluateOptions& options = {});

/// Writes the models of `from` in another format to the directory `to`, which is made.
GATELOOP_RUNTIME_API void quantize(const std::filesystem::path& from,
                                   const std::filesystem::path& to, Format format);

}  // namespace gateloop::runtime
