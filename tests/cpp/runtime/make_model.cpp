// make_model DIR: a small random model of bytes, for examples that need one.
#include <filesystem>

#include "models.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::mt19937_64 random(1);
  const gateloop::model::ModelOptions options{.num_tokens = 256, .dim = 32, .depth = 2};
  auto weights = gateloop::test::random_weights(gateloop::model::resolve(options), random);
  std::filesystem::create_directories(argv[1]);
  gateloop::test::write_model(argv[1], options, weights);
}
