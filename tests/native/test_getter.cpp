// Gets from a peer that does not answer until the test lets it: over TCP, where UCX emulates them.
#include <algorithm>
#include <memory>
#include <vector>

#include "arena.h"
#include "getter.h"
#include "ranks.h"

namespace blsrdma::test {
namespace {

constexpr std::size_t kPieces = 200;
constexpr std::uint64_t kPiece = 40;

// A getter and the memory that it reads, `there`; nothing moves but by go().
struct Pair {
  Pair() {
    for (std::size_t k = 0; k < kPieces * kPiece; ++k) memory->data()[kLine + k] = static_cast<std::byte>(1 + k % 250);
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
    params.address = reinterpret_cast<const ucp_address_t*>(there->address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    blsrdma::check(ucp_ep_create(here->worker, &params, &endpoint), "ucp_ep_create");
    blsrdma::check(ucp_ep_rkey_unpack(endpoint, memory->packed_rkey().data(), &rkey), "ucp_ep_rkey_unpack");
    getter = std::make_unique<Getter>(endpoint, rkey, [this](ucs_status_t) { ++failures; });
    batch.pieces.push_back({landed.data(), 1, at(0)});  // connects them
    getter->post(batch);
    go([&] { return batch.done(); });
    landed[0] = {};
    batch.pieces.clear();
    for (std::size_t k = 0; k < kPieces; ++k) batch.pieces.push_back({&landed[k * kPiece], kPiece, at(k * kPiece)});
    batch.word_at = at(0) - kLine;
  }
  ~Pair() {
    ucp_rkey_destroy(rkey);
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t closing = ucp_ep_close_nbx(endpoint, &param);
    if (!UCS_PTR_IS_PTR(closing)) return;
    while (ucp_request_check_status(closing) == UCS_INPROGRESS) ucp_worker_progress(here->worker);
    ucp_request_free(closing);
  }
  std::uint64_t at(std::uint64_t offset) const { return reinterpret_cast<std::uintptr_t>(memory->data()) + kLine + offset; }
  std::uint64_t& word() { return *reinterpret_cast<std::uint64_t*>(memory->data()); }
  template <typename Done>
  void go(const Done& done, bool advance = true, bool answer = true) {
    for (const std::uint64_t deadline = soon(); !done();) {
      CHECK(now_ns() < deadline);
      if (answer) ucp_worker_progress(there->worker);
      ucp_worker_progress(here->worker);
      if (advance) getter->advance();
    }
  }
  std::size_t arrived() const {
    std::size_t count = 0;
    for (std::size_t k = 0; k < kPieces; ++k) count += landed[(k + 1) * kPiece - 1] != std::byte{0};
    return count;
  }

  std::shared_ptr<Ucx> here = std::make_shared<Ucx>(kOneTcp), there = std::make_shared<Ucx>(kOneTcp);
  std::shared_ptr<Arena> memory = std::make_shared<Arena>(there->context, there, kLine + kPieces * kPiece);
  std::vector<std::byte> landed = std::vector<std::byte>(kPieces * kPiece);
  ucp_ep_h endpoint = nullptr;
  ucp_rkey_h rkey = nullptr;
  std::unique_ptr<Getter> getter;
  Getter::Batch batch;
  int failures = 0;
};

TEST(gets_in_flight_are_bounded_and_the_word_comes_last) {
  Pair pair;
  pair.word() = 1;
  pair.getter->post(pair.batch);
  CHECK(pair.getter->waiting());
  pair.go([&] { return pair.getter->idle(); }, false);
  CHECK_EQUAL(pair.arrived(), Getter::kMost);
  CHECK(pair.getter->waiting());
  pair.word() = 2;
  pair.go([&] { return pair.arrived() == kPieces && pair.getter->idle(); }, true);
  CHECK(std::equal(pair.landed.begin(), pair.landed.end(), pair.memory->data() + kLine));
  pair.go([&] { return pair.batch.done(); });
  CHECK_EQUAL(pair.batch.word, 2u);
  CHECK(!pair.getter->waiting());
  pair.batch.pieces.resize(1);  // and once more
  pair.batch.word_at = 0;
  pair.getter->post(pair.batch);
  CHECK(!pair.batch.done());
  pair.go([&] { return pair.batch.done(); });
  CHECK_EQUAL(pair.batch.word, 2u);
  CHECK_EQUAL(pair.failures, 0);
}

TEST(what_is_abandoned_lands_or_is_never_asked_for) {
  Pair pair;
  pair.getter->post(pair.batch);
  const std::uint64_t until = in_ms(5);
  pair.go([&] { return now_ns() > until; }, true, false);
  CHECK_EQUAL(pair.arrived(), 0u);
  pair.getter->abandon();
  CHECK(!pair.getter->idle());  // so that their memory is kept
  CHECK(pair.getter->waiting());
  pair.go([&] { return pair.getter->idle(); });
  CHECK_EQUAL(pair.arrived(), Getter::kMost);
  CHECK(!pair.batch.done());
  CHECK(!pair.getter->waiting());
  CHECK(!pair.getter->advance());
  CHECK_EQUAL(pair.failures, 0);
}

TEST(gets_from_a_peer_that_is_gone_fail_once) {
  Pair pair;
  pair.getter->post(pair.batch);
  pair.memory.reset();
  pair.there.reset();
  pair.go([&] { return pair.getter->idle(); }, true, false);
  CHECK_EQUAL(pair.failures, 1);
  CHECK(!pair.batch.done());
  CHECK(!pair.getter->waiting());
}

}  // namespace
}  // namespace blsrdma::test
