// A state's file: a header of fixed size, the position of every sequence, the sizes of every layer,
// their numbers, and a checksum of all before it. Little-endian.
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "model/digest.h"
#include "model/file.h"
#include "runtime/state.h"

namespace gateloop::runtime {
namespace {

constexpr std::array<char, 8> kMagic = {'G', 'L', 'S', 'T', 'A', 'T', 'E', '\n'};
/// Version 1 has one position for all sequences, in its header.
constexpr std::uint32_t kVersion = 2;
/// Bounds the sizes that a damaged header can have.
constexpr std::uint32_t kMostLayers = 1 << 20;
constexpr std::int64_t kMostSequences = 1 << 24;
constexpr std::int64_t kMostSteps = std::int64_t{1} << 62;

struct Header {
  std::array<char, 8> magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t layers = 0;
  std::uint64_t digest = 0;
  std::int64_t batch = 0;
  std::int64_t position = 0;  // of version 1, else of the longest sequence
};
static_assert(sizeof(Header) == 40);

/// Of one layer: numbers of the simple gate loop and of the recurrence, then the shape of its keys.
struct Sizes {
  std::uint64_t simple = 0, recurrence = 0, rows = 0, steps = 0, dim_head = 0;
};
static_assert(sizeof(Sizes) == 40);

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& problem) {
  throw std::runtime_error(path.string() + ": not a state of a session: " + problem);
}

/// Writes and sums up.
class Writer {
 public:
  explicit Writer(const std::filesystem::path& path) : file_(path) {}
  void write(const void* data, std::size_t bytes) {
    file_.write(data, bytes);
    digest_.add(data, bytes);
  }
  void commit() {
    const std::uint64_t checksum = digest_.value();
    file_.write(&checksum, sizeof checksum);
    file_.commit();
  }

 private:
  model::AtomicFile file_;
  model::Digest digest_;
};

class FieldReader {
 public:
  explicit FieldReader(const std::filesystem::path& path) : path_(path), file_(path) {}
  /// Of what has not been read yet.
  std::uint64_t left() const { return file_.size() - position_; }
  void read(void* data, std::size_t bytes) {
    if (left() < bytes) fail(path_, "truncated");
    file_.read(data, bytes, position_);
    position_ += bytes;
    digest_.add(data, bytes);
  }
  void check_end() {
    const std::uint64_t expected = digest_.value();
    std::uint64_t checksum = 0;
    read(&checksum, sizeof checksum);
    if (checksum != expected) fail(path_, "its checksum does not fit: it is damaged");
    if (left() != 0) fail(path_, std::to_string(left()) + " bytes follow its end");
  }

 private:
  std::filesystem::path path_;
  model::InputFile file_;
  std::uint64_t position_ = 0;
  model::Digest digest_;
};

}  // namespace

void State::save(const std::filesystem::path& path) const {
  // Steps that came later, of another state that shares the cache, are none of this one's.
  const StateData state = compact(data());
  Writer file(path);
  const Header header{.layers = static_cast<std::uint32_t>(state.layers.size()),
                      .digest = state.digest,
                      .batch = state.batch(),
                      .position = state.longest()};
  file.write(&header, sizeof header);
  file.write(state.positions.data(), state.positions.size() * sizeof(std::int64_t));
  for (const LayerState& layer : state.layers) {
    Sizes sizes{.simple = layer.simple.size(), .recurrence = layer.recurrence.size()};
    if (layer.steps) {
      sizes.rows = static_cast<std::uint64_t>(layer.steps->rows);
      sizes.steps = static_cast<std::uint64_t>(layer.steps->capacity());
      sizes.dim_head = static_cast<std::uint64_t>(layer.steps->dim_head);
    }
    file.write(&sizes, sizeof sizes);
  }
  const auto write = [&](const std::vector<float>& part) {
    file.write(part.data(), part.size() * sizeof(float));
  };
  for (const LayerState& layer : state.layers) {
    write(layer.simple);
    write(layer.recurrence);
    if (layer.steps) write(layer.steps->keys), write(layer.steps->values);
  }
  file.commit();
}

State State::load(const std::filesystem::path& path) {
  FieldReader file(path);
  Header header;
  file.read(&header, sizeof header);
  if (header.magic != kMagic) fail(path, "it does not begin as one");
  if (header.version < 1 || header.version > kVersion)
    fail(path, "version " + std::to_string(header.version) + "; this library reads versions 1 to " +
                   std::to_string(kVersion));
  if (header.layers > kMostLayers || header.batch < 0 || header.batch > kMostSequences ||
      header.position < 0 || header.position > kMostSteps)
    fail(path, "its sizes are impossible: it is damaged");
  std::vector<std::int64_t> positions(static_cast<std::size_t>(header.batch), header.position);
  if (header.version > 1) {
    file.read(positions.data(), positions.size() * sizeof(std::int64_t));
    for (const std::int64_t position : positions) {
      if (position < 0 || position > header.position)
        fail(path, "its positions are impossible: it is damaged");
    }
  }
  std::vector<Sizes> layers(header.layers);
  for (Sizes& sizes : layers) file.read(&sizes, sizeof sizes);

  State state;
  state.data_->digest = header.digest;
  state.data_->positions = std::move(positions);
  state.data_->layers.resize(header.layers);
  const auto read = [&](std::uint64_t a, std::uint64_t b = 1, std::uint64_t c = 1) {
    // Compared factor by factor: their product could overflow.
    std::uint64_t most = file.left() / sizeof(float);
    for (const std::uint64_t factor : {a, b, c}) {
      if (factor > most) fail(path, "truncated");
      if (factor > 0) most /= factor;
    }
    std::vector<float> part(a * b * c);
    file.read(part.data(), part.size() * sizeof(float));
    return part;
  };
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Sizes& sizes = layers[i];
    LayerState& layer = state.data_->layers[i];
    layer.simple = read(sizes.simple);
    layer.recurrence = read(sizes.recurrence);
    if (sizes.rows == 0 || sizes.dim_head == 0) continue;
    layer.steps = std::make_shared<StepCache>();
    layer.steps->keys = read(sizes.rows, sizes.steps, sizes.dim_head);
    layer.steps->values = read(sizes.rows, sizes.steps, sizes.dim_head);
    layer.steps->rows = static_cast<std::int64_t>(sizes.rows);
    layer.steps->dim_head = static_cast<std::int64_t>(sizes.dim_head);
    layer.steps->written = state.data_->total();
  }
  file.check_end();
  return state;
}

}  // namespace gateloop::runtime
