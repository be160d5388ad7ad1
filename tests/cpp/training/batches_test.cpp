#include "training/batches.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

namespace gateloop::training {
namespace {

std::vector<std::uint8_t> ramp(std::size_t size) {
  std::vector<std::uint8_t> text(size);
  for (std::size_t i = 0; i < size; ++i) text[i] = static_cast<std::uint8_t>(i);
  return text;
}

TEST(Batches, AreAPureFunctionOfSeedStepAndRow) {
  const auto text = ramp(200);
  const Batches batches(text, 8, 42);
  const torch::Tensor late = batches.at(1'000'000, 0, 4);
  const torch::Tensor first = batches.at(0, 0, 4);
  EXPECT_TRUE(torch::equal(Batches(text, 8, 42).at(0, 0, 4), first));
  EXPECT_TRUE(torch::equal(Batches(text, 8, 42).at(1'000'000, 0, 4), late));
  EXPECT_TRUE(torch::equal(batches.at(0, 0, 9).narrow(0, 0, 4), first));  // rows do not interact
  EXPECT_TRUE(torch::equal(batches.at(0, 1, 3), first.narrow(0, 1, 2)));
  EXPECT_FALSE(torch::equal(first, late));
  EXPECT_FALSE(torch::equal(first, Batches(text, 8, 43).at(0, 0, 4)));
}

TEST(Batches, RowsAreWindowsOfTheText) {
  const auto text = ramp(100);
  const Batches batches(text, 8, 0);
  const torch::Tensor ids = batches.at(3, 0, 5);
  EXPECT_EQ(ids.scalar_type(), torch::kInt64);
  EXPECT_EQ(ids.sizes(), (torch::IntArrayRef{5, 9}));
  for (std::int64_t row = 0; row < 5; ++row) {
    const std::int64_t start = batches.start(3, row);
    EXPECT_TRUE(torch::equal(ids[row], torch::arange(start, start + 9)));
  }
}

TEST(Batches, HighBytesStayPositive) {
  const std::vector<std::uint8_t> text(10, 0xff);
  EXPECT_EQ(Batches(text, 4, 0).at(0, 0, 2).min().item<std::int64_t>(), 255);
}

TEST(Batches, ReachEveryPlaceAndNoOther) {
  const auto text = ramp(20);
  const Batches batches(text, 8, 7);
  std::set<std::int64_t> starts;
  for (std::int64_t step = 0; step < 500; ++step) starts.insert(batches.start(step, 0));
  EXPECT_EQ(*starts.begin(), 0);
  EXPECT_EQ(*starts.rbegin(), 11);  // 11 + 8 + 1 = 20
  EXPECT_EQ(starts.size(), 12U);
}

TEST(Batches, OnePlaceWhereOneFits) {
  const auto text = ramp(9);
  EXPECT_EQ(Batches(text, 8, 1).start(5, 3), 0);
}

TEST(Batches, AreUniform) {
  const auto text = ramp(1000 + 8);
  const Batches batches(text, 8, 3);
  std::vector<int> counts(10);
  for (std::int64_t step = 0; step < 1000; ++step) {
    for (std::int64_t row = 0; row < 10; ++row) {
      ++counts[static_cast<std::size_t>(batches.start(step, row) / 100)];
    }
  }
  // 1000 expected in each, standard deviation 30: 150 is five of them.
  for (const int count : counts) EXPECT_NEAR(count, 1000, 150);
}

}  // namespace
}  // namespace gateloop::training
