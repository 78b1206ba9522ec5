// The records that peers write, and where they lie: everything that arrives is untrusted until its check word says so.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <vector>

#include "check.h"
#include "layout.h"
#include "ranks.h"

namespace blsrdma::test {
namespace {

constexpr std::uint64_t kEpoch = 0x1234'5678'9abc'def0u;

Farewell farewell(const std::string& text) {
  Farewell word{};
  word.code = Farewell::kErred;
  word.blamed = 3;
  word.posted = 17;
  word.text_bytes = static_cast<std::uint32_t>(text.size());
  std::memcpy(word.text, text.data(), text.size());
  word.check = word.digest(kEpoch);
  return word;
}

TEST(a_counter_is_seen) {
  Counter counter{};
  CHECK_EQUAL(poll(&counter, kEpoch, 0), 0u);  // never written
  for (const std::uint64_t n : {1ull, 2ull, 1ull << 40, ~0ull}) {
    publish(&counter, Counter::of(n, kEpoch));
    CHECK_EQUAL(poll(&counter, kEpoch, 0), n);
  }
}

TEST(a_counter_never_goes_back) {
  Counter counter = Counter::of(5, kEpoch);
  CHECK_EQUAL(poll(&counter, kEpoch, 5), 5u);
  CHECK_EQUAL(poll(&counter, kEpoch, 9), 9u);
}

TEST(a_torn_counter_is_not_seen) {
  const Counter before = Counter::of(255, kEpoch), after = Counter::of(256, kEpoch);
  for (std::size_t bytes = 0; bytes <= sizeof(Counter); ++bytes) {  // as many of the new one have arrived
    Counter torn = before;
    std::memcpy(&torn, &after, bytes);
    const std::uint64_t seen = poll(&torn, kEpoch, 255);
    CHECK(seen == 255 || (seen == 256 && std::memcmp(&torn, &after, sizeof torn) == 0));
  }
}

TEST(a_counter_of_another_epoch_is_not_seen) {
  Counter counter = Counter::of(7, kEpoch ^ 1);
  CHECK_EQUAL(poll(&counter, kEpoch, 0), 0u);
}

Header sealed(Header header, std::uint64_t epoch = kEpoch) {
  header.seal(epoch);
  return header;
}

template <typename Record>
Record with_bit_changed(const Record& record, std::size_t bit) {
  std::array<unsigned char, sizeof(Record)> bytes;
  std::memcpy(bytes.data(), &record, sizeof record);
  bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
  Record changed;
  std::memcpy(&changed, bytes.data(), sizeof changed);
  return changed;
}

TEST(any_changed_bit_of_a_header_shows) {
  const Header header = sealed({1000, 4096, 0x6634, Header::kLarge, 0x1234, 0});
  CHECK(header.intact(kEpoch));
  CHECK(!header.intact(kEpoch + 1));
  CHECK(!Header{}.intact(kEpoch));
  const std::size_t bits = 8 * (offsetof(Header, check) + sizeof header.check);  // the rest of the line is padding
  for (std::size_t bit = 0; bit < bits; ++bit) CHECK(!with_bit_changed(header, bit).intact(kEpoch));
}

TEST(a_header_of_old_and_new_words_shows) {
  const Header old = sealed({4, 100, 1, Header::kInline, 77, 0}), now = sealed({8, 300, 2, Header::kLarge, 99, 0});
  for (unsigned mask = 1; mask < 63; ++mask) {
    const auto pick = [&](unsigned field, std::uint64_t a, std::uint64_t b) { return mask >> field & 1 ? b : a; };
    const Header mixed{pick(0, old.iteration, now.iteration), pick(1, old.length, now.length),
                       pick(2, old.tag, now.tag),             pick(3, old.kind, now.kind),
                       pick(4, old.checksum, now.checksum),   pick(5, old.check, now.check)};
    CHECK(!mixed.intact(kEpoch));
  }
}

TEST(any_changed_bit_of_a_descriptor_shows) {
  Descriptor descriptor{};
  descriptor.address = 0x7f00'1234'5000;
  descriptor.rkey_bytes = 30;
  std::memset(descriptor.rkey, 0x5a, 30);
  descriptor.seal(kEpoch);
  CHECK(descriptor.intact(kEpoch));
  CHECK(!descriptor.intact(kEpoch + 1));
  CHECK(!Descriptor{}.intact(kEpoch));
  for (std::size_t bit = 0; bit < 8 * sizeof descriptor; ++bit) CHECK(!with_bit_changed(descriptor, bit).intact(kEpoch));
  for (const std::uint64_t bytes : {std::uint64_t{Descriptor::kRkeyBytes} + 1, ~std::uint64_t{0}}) {
    descriptor.rkey_bytes = bytes;
    descriptor.seal(kEpoch);
    CHECK(!descriptor.intact(kEpoch));
  }
}

TEST(any_changed_bit_changes_the_checksum) {
  std::vector<std::byte> data(100);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = pattern(0, 1, 2, i);
  std::vector<std::uint64_t> sums;
  for (std::size_t bytes = 0; bytes <= data.size(); ++bytes) {
    // A copy of its own size on the heap: AddressSanitizer sees a look beyond the end.
    std::vector<std::byte> part(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(bytes));
    const std::uint64_t sum = checksum(part.data(), bytes);
    for (std::size_t bit = 0; bit < 8 * bytes; ++bit) {
      part[bit / 8] ^= std::byte(1u << bit % 8);
      CHECK(checksum(part.data(), bytes) != sum);
      part[bit / 8] ^= std::byte(1u << bit % 8);
    }
    sums.push_back(sum);
  }
  std::sort(sums.begin(), sums.end());
  CHECK(std::adjacent_find(sums.begin(), sums.end()) == sums.end());  // of every length another one
}

TEST(records_go_word_by_word_and_whole) {
  alignas(kLine) std::byte memory[sizeof(Farewell)]{};
  Farewell word{};
  word.code = Farewell::kErred;
  word.check = word.digest(kEpoch);
  store_words(memory, word);
  const auto read = load_words<Farewell>(memory);
  CHECK(read.intact(kEpoch));
  CHECK_EQUAL(std::memcmp(&read, &word, sizeof word), 0);
}

TEST(a_farewell_is_told_from_what_is_none) {
  CHECK(farewell("ValueError: enough").intact(kEpoch));
  CHECK(farewell("").intact(kEpoch));
  CHECK(farewell(std::string(Farewell::kTextBytes, 'x')).intact(kEpoch));
  CHECK(!farewell("ValueError: enough").intact(kEpoch + 1));
  CHECK(!Farewell{}.intact(kEpoch));
}

TEST(a_farewell_that_is_being_written_does_not_show) {
  const Farewell word = farewell("ValueError: enough");
  for (std::size_t bytes = 0; bytes < sizeof word; ++bytes) {
    Farewell torn{};
    std::memcpy(&torn, &word, bytes);
    CHECK_EQUAL(torn.intact(kEpoch), std::memcmp(&torn, &word, sizeof word) == 0);
  }
}

TEST(a_farewell_with_impossible_fields_is_refused) {
  for (const std::uint32_t bytes : {std::uint32_t(Farewell::kTextBytes) + 1, 1u << 31, ~0u}) {
    Farewell word = farewell("text");
    word.text_bytes = bytes;
    word.check = word.digest(kEpoch);
    CHECK(!word.intact(kEpoch));
  }
  for (const std::uint32_t code : {0u, 4u, ~0u}) {
    Farewell word = farewell("text");
    word.code = code;
    word.check = word.digest(kEpoch);
    CHECK(!word.intact(kEpoch));
  }
}

TEST(nothing_in_a_control_block_overlaps) {
  const std::uint64_t there[] = {kCounterOffset, kHeartbeatOffset, kPulledOffset, kReadsOffset, kFarewellOffset};
  const std::uint64_t here[] = {0, kStagedHeartbeat, kStagedPulled, kStagedReads, kStagedFarewell};
  for (std::size_t i = 1; i < std::size(there); ++i) {
    CHECK(there[i - 1] + sizeof(Counter) <= there[i]);
    CHECK(here[i - 1] + sizeof(Counter) <= here[i]);
  }
  CHECK(kStagedFarewell + sizeof(Farewell) <= kStagingBytes);
}

TEST(nothing_in_an_arena_overlaps) {
  for (const std::uint32_t ranks : {1u, 2u, 3u, 8u}) {
    for (const std::uint32_t lag : {0u, 1u, 4u}) {
      for (const std::uint64_t bytes : {0ull, 1ull, 64ull, 1000ull}) {
        for (const bool copy_self : {false, true}) {
          const Geometry geometry = geometry_of({.ranks = ranks, .lag = lag, .window_bytes = bytes, .copy_self = copy_self});
          for (std::uint32_t self = 0; self < ranks; ++self) {
            std::vector<std::pair<std::uint64_t, std::uint64_t>> regions{{0, kLine}, {kSleeperOffset, kSleeperOffset + 4}};
            const auto add = [&](std::uint64_t start, std::uint64_t size) { regions.emplace_back(start, start + size); };
            for (std::uint32_t q = 0; q < ranks; ++q) {
              add(geometry.control(q), kControlBytes);
              add(geometry.staging(q), kStagingBytes);
              for (std::uint32_t i = 0; i < geometry.windows; ++i) {
                if (q != self || copy_self) add(geometry.window(self, q, i), kHeaderBytes + std::max(bytes, kLeastPayload));
                add(geometry.staged_header(q, i), kHeaderBytes + kLeastPayload);
              }
            }
            std::sort(regions.begin(), regions.end());
            for (std::size_t i = 1; i < regions.size(); ++i) CHECK(regions[i - 1].second <= regions[i].first);
            for (const auto& [start, end] : regions) CHECK(start % kLine == 0 && end <= geometry.arena_bytes);
          }
        }
      }
    }
  }
}

TEST(windows_come_round) {
  const Geometry geometry = geometry_of({.ranks = 3, .lag = 1});
  for (const std::uint64_t i : {0ull, 1ull, 7ull, ~0ull - 4}) {
    CHECK_EQUAL(geometry.window(0, 2, i), geometry.window(0, 2, i % geometry.windows));
    CHECK(geometry.window(0, 2, i) != geometry.window(0, 2, i + 1));
    CHECK(geometry.window(0, 1, i) != geometry.window(0, 2, i));
  }
}

}  // namespace
}  // namespace blsrdma::test
