#include "inbox.h"

namespace blsrdma {

bool Inbox::arrived(std::uint64_t iteration) {
  if (iteration < complete_) return true;
  bool all = true;
  for (std::uint32_t q = 0; q < seen_.size(); ++q) {
    if (seen_[q] > iteration || q == rank_) continue;
    all &= look(q) > iteration;
  }
  if (all) complete_ = iteration + 1;
  return all;
}

std::optional<Farewell> Inbox::farewell(std::uint32_t source) const {
  const auto copy = load_words<Farewell>(base_ + geometry_.control(source) + kFarewellOffset);
  if (!copy.intact(epoch_)) return std::nullopt;
  return copy;
}

namespace {

// Whether `word` is what `before` may look like while `after` is written over it, byte by byte.
bool between(std::uint64_t word, std::uint64_t before, std::uint64_t after) {
  for (int bits = 0; bits < 64; bits += 8) {
    const std::uint64_t written = (std::uint64_t{1} << bits) - 1;
    if (word == ((after & written) | (before & ~written))) return true;
  }
  return word == after;
}

std::string about(std::uint64_t value, std::uint64_t claimed, std::uint64_t least, std::uint64_t most) {
  return "its counter (" + std::to_string(value) + ", check word for " + std::to_string(claimed) + ") is not in " +
         std::to_string(least) + " .. " + std::to_string(most);
}

}  // namespace

std::string Inbox::suspicion(std::uint32_t source, std::uint64_t posted, std::uint32_t lag) const {
  const std::uint64_t seen = seen_[source];
  if (ways_[source] == Way::puts) {
    // What lies there: the counter of the message that was in this window before, if any, perhaps half overwritten by the
    // one that is expected. A stopped sender may leave it like that.
    const bool used = seen >= geometry_.windows;
    const Counter before = used ? Counter::of(seen + 1 - geometry_.windows, epoch_) : Counter{0, 0};
    const Counter after = Counter::of(seen + 1, epoch_);
    Counter* line = arrival(source, seen);
    const std::uint64_t value = std::atomic_ref<std::uint64_t>(line->value).load(std::memory_order_acquire);
    const std::uint64_t check = std::atomic_ref<std::uint64_t>(line->check).load(std::memory_order_acquire);
    if (between(value, before.value, after.value) && between(check, before.check, after.check)) return "";
    return about(value, ~(check ^ epoch_), before.value, after.value);
  }
  Counter* line = counter(source, kCounterOffset);
  const std::uint64_t value = std::atomic_ref<std::uint64_t>(line->value).load(std::memory_order_acquire);
  const std::uint64_t check = std::atomic_ref<std::uint64_t>(line->check).load(std::memory_order_acquire);
  if (value == 0 && check == 0) return "";  // never written
  // It posts j when it holds j - lag - 1 of everyone's, this rank's included. A sender that is stopped between its two
  // stores leaves an old value beside a new check word: each by itself must be one that it can have written.
  const std::uint64_t most = posted + lag + 1;
  for (const std::uint64_t each : {value, ~(check ^ epoch_)}) {
    if (each < seen || each > most) return about(value, ~(check ^ epoch_), seen, most);
  }
  return "";
}

std::string Inbox::read(std::uint64_t iteration, std::uint32_t source, Header& header) const {
  std::memcpy(&header, payload(iteration, source) - kHeaderBytes, sizeof header);
  if (!header.intact(epoch_)) return "its header does not match its check word";
  if (header.iteration != iteration) {
    return "its window holds the message of iteration " + std::to_string(header.iteration);
  }
  if (header.kind == Header::kInline && header.length > geometry_.window_bytes) {
    return "its header claims " + std::to_string(header.length) + " bytes in a window of " +
           std::to_string(geometry_.window_bytes);
  }
  if (header.kind == Header::kDevice && device_bytes_ && header.length > device_bytes_) {
    return "its header claims " + std::to_string(header.length) + " bytes in a device window of " +
           std::to_string(device_bytes_);
  }
  // Nothing is too large for a window of device memory; without these nothing comes there.
  const bool unknown = header.kind > Header::kDevice || header.kind == (device_bytes_ ? Header::kLarge : Header::kDevice);
  if (unknown) return "its header has the unknown kind " + std::to_string(header.kind);
  return "";
}

std::string Inbox::read(std::uint64_t iteration, std::uint32_t source, Descriptor& descriptor) const {
  std::memcpy(&descriptor, payload(iteration, source), sizeof descriptor);
  return descriptor.intact(epoch_) ? "" : "the address of its large message does not match its check word";
}

}  // namespace blsrdma
