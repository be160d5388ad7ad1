/// The binary as a user meets it: exit codes, one line on standard error, bytes on standard output.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "gateloop/checkpoint.h"
#include "gateloop/nn/transformer.h"
#include "model/file.h"

namespace gateloop {
namespace {

namespace fs = std::filesystem;

nn::TransformerOptions small_options() {
  return {.dim = 16, .depth = 2, .dim_head = 8, .heads = 2, .ff_mult = 2};
}

struct Outcome {
  int code;
  std::string out, err;
};

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// One directory for all tests: a small random model in `model`, a text, and things that are wrong.
class Cli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    // Each test may run in a process of its own, at the same time as the others.
    dir = fs::temp_directory_path() / ("gateloop_cli_test_" + std::to_string(getpid()));
    fs::create_directories(dir / "empty");
    save("model", small_options());
    write(dir / "text", std::string(1000, 'a') + "bc");
  }
  static void TearDownTestSuite() { fs::remove_all(dir); }

  static void save(const std::string& name, const nn::TransformerOptions& options) {
    torch::manual_seed(1);
    const nn::Transformer model(options);
    fs::create_directories(dir / name);
    model::save_text(dir / name / "config.json",
                     R"({"format": 1, "model": )" + model::to_json(options) + "}");
    checkpoint::save_safetensors(dir / name / "model.safetensors",
                                 {checkpoint::state_dict(*model), {{"step", "7"}}});
  }

  /// `trained`: the model of `model`, whose config.json has `training`.
  static void trained_with(const std::string& training) {
    fs::remove_all(dir / "trained");
    fs::copy(dir / "model", dir / "trained");
    const std::string text = read(dir / "trained/config.json");
    write(dir / "trained/config.json", "{\"training\": " + training + "," + text.substr(1));
  }

  /// Runs `gateloop ARGUMENTS` in `dir`. Words may be quoted as for the shell.
  static Outcome run(const std::string& arguments) {
    const auto command = "cd " + dir.string() + " && " GATELOOP_BINARY " " + arguments;
    const auto out = dir / "stdout", err = dir / "stderr";
    const int status = std::system(
        ("exec < /dev/null; (" + command + ") > " + out.string() + " 2> " + err.string()).c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(out), read(err)};
  }

  static void expect_refused(const std::string& arguments, const std::string& hint, int code = 2) {
    const auto outcome = run(arguments);
    EXPECT_EQ(outcome.code, code) << arguments << "\n" << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << arguments << "\n"
                                                                           << outcome.err;
    EXPECT_NE(outcome.err.find(hint), std::string::npos) << arguments << "\n" << outcome.err;
    EXPECT_EQ(outcome.out, "") << arguments;
  }

  static fs::path dir;
};
fs::path Cli::dir;

TEST_F(Cli, RefusesMissingModelsAndFiles) {
  for (const std::string command : {"generate", "info", "evaluate --data text"}) {
    expect_refused(command, "--checkpoint");
    expect_refused(command + " --checkpoint nowhere", "nowhere");
    expect_refused(command + " --checkpoint empty", "config.json");
    expect_refused(command + " --checkpoint model --weights best", "--weights latest");
  }
  expect_refused("generate --checkpoint model --prompt-file nowhere", "nowhere");
  expect_refused("evaluate --checkpoint model --data nowhere", "nowhere");
  expect_refused("evaluate --checkpoint model", "--data");
}

TEST_F(Cli, ADocumentBeginsAndEndsAtTheSeparator) {
  const auto drawn = [](const std::string& flags) {
    return run("generate --length 2000 --top-k-threshold 0 --seed 3 --checkpoint " + flags);
  };
  const auto whole = drawn("model --prompt \"$(printf '\\377ab')\"");
  const auto end = whole.out.find('\xFF');
  ASSERT_LT(end, 2000U) << "a seed that draws no separator shows nothing";
  const auto document = drawn("model --prompt ab --documents");
  EXPECT_EQ(document.code, 0) << document.err;
  EXPECT_EQ(document.out, whole.out.substr(0, end));

  trained_with("{\"documents\": true}");
  EXPECT_EQ(drawn("trained --prompt ab").out, document.out);
  EXPECT_EQ(drawn("trained --prompt ab --no-documents").out, drawn("model --prompt ab").out);
}

TEST_F(Cli, EvaluatesDocuments) {
  write(dir / "rows.jsonl", "{\"text\": \"aaaa\"}\n{\"text\": \"aab\"}\n{\"text\": \"aaaa\"}\n");
  const auto outcome =
      run("evaluate --checkpoint model --data rows.jsonl --field text --documents");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("14 bytes predicted"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("the state carried through each document"), std::string::npos);
  expect_refused("evaluate --checkpoint model --data rows.jsonl --field title",
                 "rows.jsonl: line 1: there is no field \"title\" among \"text\"");
}

TEST_F(Cli, EvaluatesDocumentsAsTheModelWasTrained) {
  write(dir / "rows.jsonl", "{\"text\": \"aaaa\"}\n{\"text\": \"aab\"}\n");
  const auto figures = [](const std::string& flags) {
    const auto outcome =
        run("evaluate --checkpoint trained --data rows.jsonl --field text --mode carried" + flags);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return outcome;
  };
  const std::string apart = "9 bytes predicted", one = "8 bytes predicted";
  const std::string said = "documents apart, as the model was trained (--no-documents";
  const auto expect = [](const std::string& text, const std::string& part, bool is_there = true) {
    EXPECT_EQ(text.find(part) != std::string::npos, is_there) << part << "\n" << text;
  };

  trained_with("{\"documents\": true}");
  expect(figures("").out, apart);
  expect(figures("").out, said);
  expect(figures(" --documents").out, apart);
  expect(figures(" --documents").out, said, false);
  expect(figures(" --no-documents").out, one);
  expect(figures(" --no-documents").out, said, false);
  EXPECT_EQ(figures(" --documents").err, "");

  trained_with("{\"seed\": 1}");
  expect(figures("").out, one);
  EXPECT_EQ(figures("").err, "");
  expect(figures(" --documents").out, apart);
  expect(figures(" --documents").err, "trained was trained without --documents");
  expect_refused("evaluate --checkpoint trained --data text --documents --no-documents",
                 "--documents");
}

TEST_F(Cli, RefusesBadFlags) {
  const std::string generate = "generate --checkpoint model ";
  expect_refused(generate + "--lenght 5", "--lenght");
  expect_refused("evaluate --checkpoint model --data text --field ''", "--field");
  expect_refused(generate + "--length -5", "--length");
  expect_refused(generate + "--length five", "five");
  expect_refused(generate + "--temperature -1", "--temperature");
  expect_refused(generate + "--top-k-threshold 2", "--top-k-threshold");
  expect_refused(generate + "--top-k -1", "--top-k");
  expect_refused(generate + "--top-p 0", "top_p");
  expect_refused(generate + "--min-p 2", "--min-p");
  expect_refused(generate + "--repetition-penalty 0", "repetition_penalty");
  expect_refused(generate + "--stop ''", "--stop");
  expect_refused(generate + "--weights worst", "--weights");
  expect_refused(generate + "--dtype int4", "--dtype");
  expect_refused(generate + "--threads 0", "--threads");
  expect_refused(generate + "--prompt a --prompt-file text", "--prompt");
  const std::string evaluate = "evaluate --checkpoint model --data text ";
  expect_refused(evaluate + "--length 0", "--length");
  expect_refused(evaluate + "--part some", "--part");
  expect_refused(evaluate + "--split 900,50", "--split");
  expect_refused(evaluate + "--split 9000,50,50", "split");
  expect_refused(evaluate + "--split 1002,0,0 --part test", "--part");
}

TEST_F(Cli, RunTimeFailuresAreOne) {
  save("damaged", small_options());
  fs::resize_file(dir / "damaged/model.safetensors", 1000);
  expect_refused("generate --checkpoint damaged", "model.safetensors", 1);
  auto options = small_options();
  options.num_tokens = 98;
  save("letters", options);
  expect_refused("generate --checkpoint letters --prompt xyz", "98", 1);
  expect_refused("evaluate --checkpoint letters --data text", "99", 1);
}

TEST_F(Cli, RefusesBytesForAModelOfOtherTokens) {
  auto options = small_options();
  options.num_tokens = 257;
  save("words", options);
  for (const std::string command :
       {"generate", "evaluate --data text", "quantize --data text --out q"})
    expect_refused(command + " --checkpoint words", "257 tokens");
  EXPECT_FALSE(fs::exists(dir / "q"));
  EXPECT_EQ(run("quantize --checkpoint words --out q").code, 0);

  save("pieces", small_options());
  write(dir / "pieces/tokenizer.json", "{}");
  expect_refused("generate --checkpoint pieces", "tokenizer.json");
  EXPECT_EQ(run("quantize --checkpoint pieces --out p").code, 0);
  EXPECT_EQ(read(dir / "p/tokenizer.json"), "{}");
  // A model of bytes in its place is none of that tokenizer's.
  EXPECT_EQ(run("quantize --checkpoint model --out p").code, 0);
  EXPECT_EQ(run("generate --checkpoint p --length 1").code, 0);
}

TEST_F(Cli, GenerateWritesTheBytesDrawn) {
  const std::string command = "generate --checkpoint model --prompt 'The ' --length 20 --seed 3";
  const auto outcome = run(command);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out.size(), 20u);
  EXPECT_NE(outcome.err.find("tokens/s"), std::string::npos) << outcome.err;
  EXPECT_EQ(run(command).out, outcome.out);
  EXPECT_EQ(run(command + " --threads 1").out, outcome.out);
  EXPECT_EQ(run(command + " --echo-prompt").out, "The " + outcome.out);
  EXPECT_NE(run(command + "1").out, outcome.out);  // seed 31
  EXPECT_EQ(run("generate --checkpoint model --length 0").out, "");
  EXPECT_EQ(run("generate --checkpoint model --length 5 --prompt ''").out,
            run("generate --checkpoint model --length 5").out);
  for (const std::string dtype : {"float32", "bfloat16", "float16", "int8"})
    EXPECT_EQ(run("generate --checkpoint model --length 5 --dtype " + dtype).out.size(), 5u);
  EXPECT_EQ(run("generate --checkpoint model --length 5 --prompt-file text").out.size(), 5u);
}

TEST_F(Cli, ComputesOnTheDeviceAskedFor) {
  const std::string generate = "generate --checkpoint model --length 5 ";
  const std::string evaluate = "evaluate --checkpoint model --data text ";
  const auto expected = run(generate).out;
  EXPECT_EQ(run(generate + "--device cpu --dtype int8").code, 0);
  for (const std::string& command : {generate, evaluate}) {
    expect_refused(command + "--device gpu", "--device must be cpu, cuda, cuda:N or auto");
    expect_refused(command + "--device cuda:1000", "cuda:1000");
  }
  // Where there is a GPU its bits are others.
  const bool has_gpu = torch::cuda::is_available();
  const auto by_itself = run(generate + "--device auto");
  EXPECT_EQ(by_itself.code, 0) << by_itself.err;
  EXPECT_EQ(by_itself.out.size(), 5u);
  if (!has_gpu) {
    EXPECT_EQ(by_itself.out, expected);
  }
  // A pipe, which can be read once, though another program takes over.
  const std::string piped = "generate --checkpoint model --length 0 --echo-prompt --prompt-file ";
  EXPECT_EQ(run(piped + "/dev/stdin --device auto < text").out, read(dir / "text"));
  const auto scores = run(evaluate + "--device auto");
  EXPECT_EQ(scores.code, 0) << scores.err;
  EXPECT_NE(scores.out.find("carried"), std::string::npos) << scores.out;
  if (has_gpu) expect_refused(generate + "--device cuda --dtype int8", "--device cpu");
}

const char* const kPrinting[] = {"--help", "generate --checkpoint model --length 5",
                                 "info --checkpoint model",
                                 "evaluate --checkpoint model --data text"};

TEST_F(Cli, AClosedPipeEndsQuietlyAsAnyFilter) {
  for (const std::string command : kPrinting) {
    fs::remove(dir / "closed");
    // The reader closes its end before the program starts.
    write(dir / "script", "(until [ -e closed ]; do :; done; " GATELOOP_BINARY " " + command +
                              " 2> said; echo $? > code) | (exec <&-; : > closed)");
    ASSERT_EQ(std::system(("cd " + dir.string() + " && bash script 2> shell").c_str()), 0);
    EXPECT_EQ(read(dir / "code"), std::to_string(128 + SIGPIPE) + "\n") << command;
    // Timings may come before the pipe is seen to be closed; no message of an error does.
    EXPECT_EQ(read(dir / "said").find("gateloop:"), std::string::npos) << read(dir / "said");
  }
}

TEST_F(Cli, AnOutputThatTakesNothingIsSaid) {
  for (const std::string command : kPrinting) {
    for (const auto* output : {"> /dev/full", ">&-"}) {
      const auto outcome = run(command + " " + output);
      EXPECT_EQ(outcome.code, 1) << command << output;
      EXPECT_NE(outcome.err.find("standard output"), std::string::npos) << command << outcome.err;
    }
  }
}

TEST_F(Cli, WeightsCutWhileTheyAreReadAreNamed) {
  fs::copy(dir / "model", dir / "cut", fs::copy_options::recursive);
  write(dir / "script", GATELOOP_BINARY
        " generate --checkpoint cut --length 100000000 2> said > bytes & "
        "until [ -s bytes ]; do :; done; truncate -s 100 cut/model.safetensors; "
        "wait $!; echo $? > code");
  ASSERT_EQ(std::system(("cd " + dir.string() + " && bash script 2> shell").c_str()), 0);
  EXPECT_EQ(read(dir / "code"), "1\n");
  EXPECT_NE(read(dir / "said").find("became shorter while they were read"), std::string::npos);
}

TEST_F(Cli, EvaluateGivesBothFiguresAndTheirMeaning) {
  const auto outcome = run("evaluate --checkpoint model --data text");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  for (const std::string word : {"windowed", "carried", "1001", "bits per byte"})
    EXPECT_NE(outcome.out.find(word), std::string::npos) << word << "\n" << outcome.out;
  const auto part =
      run("evaluate --checkpoint model --data text --split 900,50,52 --part test --length 10");
  EXPECT_EQ(part.code, 0) << part.err;
  EXPECT_NE(part.out.find("51"), std::string::npos) << part.out;
}

TEST_F(Cli, EvaluateSaysWhyAttentionHasNoCarriedFigure) {
  auto options = small_options();
  options.use_gate_looped_attn = false;
  save("attention", options);
  const auto outcome = run("evaluate --checkpoint attention --data text");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("key/value cache"), std::string::npos) << outcome.out;
}

TEST_F(Cli, QuantizeWritesASmallerModelAndSaysWhatItCosts) {
  const auto outcome = run("quantize --checkpoint model --out small --data text --last 500");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  for (const std::string word : {"before", "after", "bits per byte", "last 500 bytes"})
    EXPECT_NE(outcome.out.find(word), std::string::npos) << word << "\n" << outcome.out;
  EXPECT_LT(fs::file_size(dir / "small/model.safetensors"),
            fs::file_size(dir / "model/model.safetensors"));
  // Other commands read what was written.
  EXPECT_EQ(run("generate --checkpoint small --length 5").out.size(), 5u);
  EXPECT_EQ(run("quantize --checkpoint small --out half --format bfloat16").code, 0);
  trained_with("{\"documents\": true}");
  const std::string documents = "quantize --checkpoint trained --data text --last 500 --out ";
  EXPECT_NE(run(documents + "apart").out.find("documents apart"), std::string::npos);
  EXPECT_EQ(run(documents + "one --no-documents").out, outcome.out);
  EXPECT_EQ(run("info --checkpoint half").code, 0);
  const std::string quantize = "quantize --checkpoint model --out refused ";
  expect_refused("quantize --checkpoint model", "--out");
  expect_refused("quantize --checkpoint empty --out refused", "config.json");
  expect_refused("quantize --checkpoint model --out model", "another directory");
  expect_refused(quantize + "--format int4", "--format");
  expect_refused(quantize + "--data nowhere", "nowhere");
  expect_refused(quantize + "--no-documents", "--data");
  EXPECT_FALSE(fs::exists(dir / "refused"));
}

TEST_F(Cli, InfoShowsTheModel) {
  const auto outcome = run("info --checkpoint model");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  std::int64_t parameters = 0;
  for (const auto& parameter : nn::Transformer(small_options())->parameters())
    parameters += parameter.numel();
  for (const std::string& word :
       {std::string("\"dim\""), std::string("layers.*.0.fn.to_qkv"), std::string("step 7"),
        std::to_string(parameters / 1000) + "," +
            std::to_string(1000 + parameters % 1000).substr(1),
        std::to_string(2 * 16 * 8) + " bytes"})
    EXPECT_NE(outcome.out.find(word), std::string::npos) << word << "\n" << outcome.out;
}

}  // namespace
}  // namespace gateloop
