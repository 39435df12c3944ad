// A cursor over bytes from strangers: it hands out the next n bytes or refuses with the offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fedcodec {

// The bytes break a sentence of docs/format.md; `offset` is from the start of the payload.
struct Malformed {
  std::string message;
  size_t offset;
};

class Reader {
 public:
  Reader(const uint8_t* payload, size_t start, size_t stop)
      : payload_(payload), at_(start), stop_(stop) {}

  size_t offset() const { return at_; }
  size_t left() const { return stop_ - at_; }

  const uint8_t* take(uint64_t n, const char* what) {
    if (n > left()) {
      throw Malformed{std::string(what) + " needs " + std::to_string(n) + " bytes, " +
                          std::to_string(left()) + " are left",
                      at_};
    }
    const uint8_t* bytes = payload_ + at_;
    at_ += static_cast<size_t>(n);
    return bytes;
  }

  // The bytes of a bit string; the bits that pad the last one must be zero.
  const uint8_t* take_bits(uint64_t n, const char* what) {
    const uint8_t* bytes = take(n / 8 + (n % 8 != 0), what);
    if (n % 8 != 0 && bytes[n / 8] >> (n % 8) != 0) {
      throw Malformed{std::string(what) + " is not padded with zeros", at_ - 1};
    }
    return bytes;
  }

  uint8_t byte(const char* what) { return *take(1, what); }

  // At most 64 bits, in the shortest form.
  uint64_t varint(const char* what) {
    const size_t start = at_;
    uint64_t value = 0;
    for (unsigned shift = 0;; shift += 7) {
      const uint64_t next = byte(what);
      const bool too_long = shift == 63 && next > 1;
      const bool not_shortest = shift > 0 && next == 0;
      if (too_long || not_shortest) {
        throw Malformed{
            std::string(what) + " is not a varint of at most 64 bits in its shortest form", start};
      }
      value |= (next & 0x7f) << shift;
      if (next < 0x80) return value;
    }
  }

  void finish(const char* what) const {
    if (left() > 0) throw Malformed{std::to_string(left()) + " bytes follow " + what, at_};
  }

 private:
  const uint8_t* payload_;
  size_t at_;
  size_t stop_;
};

}  // namespace fedcodec
