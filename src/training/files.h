#pragma once

#include <filesystem>
#include <string>

namespace gateloop::training {

// The files of a run's directory.
inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kLatestFile = "model.safetensors";
inline constexpr const char* kBestFile = "model.best.safetensors";
inline constexpr const char* kStateFile = "training_state.safetensors";
inline constexpr const char* kMetricsFile = "metrics.jsonl";
inline constexpr const char* kRunFiles[] = {kConfigFile, kLatestFile, kBestFile, kStateFile,
                                            kMetricsFile};

/// The absolute path as text for JSON, which is UTF-8. A name of other bytes becomes a URI as in
/// RFC 8089, "file:///data/%FF". So every reader of JSON can read the file.
std::string path_to_text(const std::filesystem::path& path);
/// The reverse. Throws std::runtime_error for a URI that is malformed.
std::filesystem::path path_from_text(const std::string& text);

}  // namespace gateloop::training
