// Weights of e4m3 decoded in registers, as a template over `Ops`; private to the file that includes it, like kernels.hpp.
//
// Every code is exact in bf16 and in fp32.  A decoder that is quick may give something else for a few codes, and then
// its flags say so: whoever decoded with it does so again exactly.
//
// Ops states how UNIT columns are decoded and multiplied:
//   X, Act             element of a prepared row of x, of an activation that is multiplied
//   Vec                a register
//   UNIT               columns that are decoded at once, 64 or fewer; divides SCALED
//   VECS, SUMS         registers of UNIT columns of a row, and of as many sums in fp32
//   ATOM_STEP          rows of `down` that are multiplied at once
//   REGISTERS          16 or 32, from which the tiles follow
//   Flags              any(): whether a quick decoder has met a code that is not its own
//   decode, decode_rows  <EXACT>: UNIT columns of a row, of ATOM_STEP rows
//   UNSCALE            what a decoded weight is to be multiplied by
//   prepare            a row of x, in the order of decoded columns and zeros behind it
//   store              of sums, in the order of decoded columns

#pragma once

#include "kernels.hpp"

namespace {

// Of decoders that know every code.
struct NoFlags {
  bool any() const { return false; }
};

// What made v comes before what follows: else g++ moves it behind the look at the flags, and spills what it is made of.
template <class Vec>
inline void settle(Vec& v) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__ volatile("" : "+w"(v));
#endif
}

template <class Ops>
struct Fp8Decoder {
  using X = typename Ops::X;
  using Act = typename Ops::Act;
  using Vec = typename Ops::Vec;
  using Flags = typename Ops::Flags;
  static constexpr int UNIT = Ops::UNIT, VECS = Ops::VECS, SUMS = Ops::SUMS, ATOM_STEP = Ops::ATOM_STEP;
  static constexpr int LANES = UNIT / SUMS;
  static constexpr bool MANY = Ops::REGISTERS >= 32;
  static constexpr int GROUP = 8;  // atoms whose rows are decoded, or added, at once

  static const uint8_t* codes(const void* p) { return static_cast<const uint8_t*>(p); }
  static int64_t count_groups(int64_t H) { return (H + SCALED - 1) / SCALED; }
  static int64_t pad(int64_t H) { return count_groups(H) * SCALED; }
  static int64_t decoded_vecs(int64_t H) { return pad(H) / UNIT * VECS; }

  // UNIT columns from p, of which `left` are there, of a row and of ATOM_STEP rows that are H apart.
  template <bool EXACT>
  static inline void decode_row(const uint8_t* p, int64_t left, Vec* w, Flags* flags) {
    if (left >= UNIT) {
      Ops::template decode<EXACT>(p, w, flags);
    } else {
      alignas(64) uint8_t padded[UNIT] = {};
      std::memcpy(padded, p, left);
      Ops::template decode<EXACT>(padded, w, flags);
    }
  }
  template <bool EXACT>
  static inline void decode_rows(const uint8_t* p, int64_t H, int64_t left, Vec* parts, Flags* flags) {
    if (left >= UNIT) {
      Ops::template decode_rows<EXACT>(p, H, parts, flags);
    } else {
      alignas(64) uint8_t padded[ATOM_STEP * UNIT] = {};
      for (int r = 0; r < ATOM_STEP; ++r) std::memcpy(padded + r * UNIT, p + r * H, left);
      Ops::template decode_rows<EXACT>(padded, UNIT, parts, flags);
    }
  }

  // The same, right for every code; of rows it returns whether there was one for the exact decoder.
  static inline void decode_row(const uint8_t* p, int64_t left, Vec* w) {
    Flags flags{}, again{};
    decode_row<false>(p, left, w, &flags);
    if (flags.any()) decode_row<true>(p, left, w, &again);
  }
  static inline bool decode_rows(const uint8_t* p, int64_t H, int64_t left, Vec* parts) {
    Flags flags{}, again{};
    decode_rows<false>(p, H, left, parts, &flags);
    if (!flags.any()) return false;
    decode_rows<true>(p, H, left, parts, &again);
    return true;
  }
};

}  // namespace
