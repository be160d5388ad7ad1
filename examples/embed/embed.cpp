// embed_cpp DIR: continues a text by the likeliest bytes.
#include <gateloop/runtime.h>

#include <algorithm>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: embed_cpp DIR\n";
    return 2;
  }
  try {
    std::string text = "The quick brown fox";
    gateloop::runtime::Session session{gateloop::runtime::Model(argv[1])};
    const std::vector<std::int64_t> ids(text.begin(), text.end());
    auto logits = session.prefill(ids);
    for (int i = 0; i < 16; ++i) {
      const std::int64_t next = std::max_element(logits.begin(), logits.end()) - logits.begin();
      text += static_cast<char>(next);
      logits = session.step(std::span(&next, 1));
    }
    std::cout << text << "\n16 bytes more from a state of " << session.state().bytes()
              << " bytes\n";
  } catch (const std::exception& error) {
    std::cerr << "embed_cpp: " << error.what() << '\n';
    return 1;
  }
}
