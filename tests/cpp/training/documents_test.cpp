// Documents in one row: no state passes from one to the next.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "gateloop/corpus.h"
#include "gateloop/evaluation.h"
#include "models.h"
#include "training/packed_rows.h"

namespace gateloop::training {
namespace {

using corpus::kSeparator;

std::vector<std::uint8_t> separated(const std::vector<std::string>& documents) {
  std::vector<std::uint8_t> text = {kSeparator};
  for (const std::string& document : documents) {
    text.insert(text.end(), document.begin(), document.end());
    text.push_back(kSeparator);
  }
  return text;
}

/// (1, T).
torch::Tensor ids_of(const std::vector<std::uint8_t>& text) {
  return torch::tensor(std::vector<std::int64_t>(text.begin(), text.end())).unsqueeze(0);
}

struct Case {
  const char* name;
  std::function<void(nn::TransformerOptions&)> change;
};

class Documents : public testing::TestWithParam<Case> {
 protected:
  Documents() {
    auto options = test::small_options();
    GetParam().change(options);
    model_ = test::make_model(options);
  }

  /// Nats of the bytes after the first of each row, and the gradient that they give the weights.
  double backward(const torch::Tensor& ids, Separator separator) {
    const auto loss = next_byte_loss(model_, ids, separator, at::Reduction::Sum);
    loss.backward();
    return loss.item<double>();
  }
  std::vector<torch::Tensor> take_gradients() {
    std::vector<torch::Tensor> gradients;
    for (torch::Tensor& parameter : model_->parameters()) {
      if (parameter.grad().defined()) gradients.push_back(parameter.grad());
      parameter.mutable_grad().reset();
    }
    return gradients;
  }

  nn::Transformer model_{nullptr};
};

const std::vector<std::string> kDocuments = {"the first document", "b",
                                             "and the last one of three"};

TEST_P(Documents, InOneRowHaveTheLossesAndGradientsOfEachAlone) {
  double alone = 0;
  // Alone, the row has nothing before it that a separator could hide.
  for (const std::string& document : kDocuments) {
    alone += backward(ids_of(separated({document})), std::nullopt);
  }
  const auto gradients_alone = take_gradients();
  const auto row = ids_of(separated(kDocuments));
  EXPECT_NEAR(backward(row, kSeparator), alone, 1e-9 * alone);
  const auto gradients = take_gradients();
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    EXPECT_TRUE(torch::allclose(gradients[i], gradients_alone[i], 1e-8, 1e-10)) << i;
  }
  // The model does carry a state where nothing stops it.
  EXPECT_GT(std::abs(backward(row, std::nullopt) - alone), 1e-6);
}

TEST_P(Documents, RowsStartAnewWhereverTheyAreCut) {
  const auto text = separated(kDocuments);
  const auto row = ids_of(text);
  const auto cut = torch::cat({row.narrow(1, 3, 21), row.narrow(1, 15, 21)});  // (2, 21)
  const double alone =
      backward(row.narrow(1, 3, 17), std::nullopt) +  // to the separator at 19
      backward(row.narrow(1, 19, 3), std::nullopt) +  // "b"
      backward(row.narrow(1, 21, 3), std::nullopt) + backward(row.narrow(1, 15, 5), std::nullopt) +
      backward(row.narrow(1, 19, 3), std::nullopt) + backward(row.narrow(1, 21, 15), std::nullopt);
  EXPECT_NEAR(backward(cut, kSeparator), alone, 1e-9 * alone);
}

TEST_P(Documents, AreEvaluatedAsEachAlone) {
  const torch::NoGradGuard no_grad;
  const auto text = separated(kDocuments);
  double alone = 0;
  for (const std::string& document : kDocuments) {
    const auto ids = ids_of(separated({document}));
    alone += next_byte_loss(model_, ids, std::nullopt, at::Reduction::Sum).item<double>();
  }
  EvaluationOptions options;
  options.length = 1000;
  options.separator = kSeparator;
  const auto score = evaluate_windows(model_, text, options);
  EXPECT_EQ(score.bytes, std::ssize(text) - 1);
  EXPECT_NEAR(score.nats, alone, 1e-9 * alone);
}

INSTANTIATE_TEST_SUITE_P(
    Models, Documents,
    testing::Values(Case{"MaxHeads", [](auto&) {}},
                    Case{"WideHeads", [](auto& o) { o.gate_loop_heads = 4; }},
                    Case{"PerKey",
                         [](auto& o) {
                           o.gate_loop_heads = 4;
                           o.gate_loop_dim_key = 8;
                           o.per_key_transitions = true;
                         }},
                    Case{"Taylor",
                         [](auto& o) {
                           o.gate_loop_heads = 4;
                           o.feature_map = model::FeatureMap::kTaylor;
                         }},
                    Case{"MagnitudePhase", [](auto& o) { o.gate = nn::Gate::kMagnitudePhase; }},
                    Case{"Sigmoid", [](auto& o) { o.gate = nn::Gate::kSigmoid; }},
                    Case{"SimpleGateLoop", [](auto& o) { o.simple_gate_loop.emplace(); }},
                    Case{"FullAttention",
                         [](auto& o) {
                           o.use_gate_looped_attn = false;
                           o.rotary_emb = true;
                         }},
                    Case{"Window",
                         [](auto& o) {
                           o.use_gate_looped_attn = false;
                           o.window = 7;
                           o.rotary_emb = true;
                         }},
                    Case{"RelativePositions",
                         [](auto& o) {
                           o.use_gate_looped_attn = false;
                           o.data_dependent_rel_pos = true;
                         }}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace gateloop::training
