#pragma once

/// The files of a run's directory.
namespace gateloop::training {

inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kLatestFile = "model.safetensors";
inline constexpr const char* kBestFile = "model.best.safetensors";
inline constexpr const char* kStateFile = "training_state.safetensors";
inline constexpr const char* kMetricsFile = "metrics.jsonl";
inline constexpr const char* kRunFiles[] = {kConfigFile, kLatestFile, kBestFile, kStateFile,
                                            kMetricsFile};

}  // namespace gateloop::training
