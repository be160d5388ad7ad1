// Carries the precompiled libtorch header that the other targets reuse; holds no code.
