#include "getter.h"

namespace blsrdma {

void Getter::post(Batch& batch) {
  batch.getter_ = this;
  batch.taken_ = 0;
  batch.left_ = batch.pieces.size();
  batch.done_.store(false, std::memory_order_relaxed);
  batches_.push_back(&batch);
  advance();
}

bool Getter::advance() {
  bool moved = false;
  while (in_flight_ < kMost && !abandoned_.load()) {
    if (!words_.empty()) {
      Batch& batch = *words_.front();
      words_.pop_front();
      batch.left_ = 1;
      start(batch, {reinterpret_cast<std::byte*>(&batch.word), sizeof batch.word, batch.word_at});
    } else if (!batches_.empty()) {
      Batch& batch = *batches_.front();
      const Piece& piece = batch.pieces[batch.taken_++];
      if (batch.taken_ == batch.pieces.size()) batches_.pop_front();
      start(batch, piece);
    } else {
      break;
    }
    moved = true;
  }
  return moved;
}

void Getter::start(Batch& batch, const Piece& piece) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = got;
  param.user_data = &batch;
  ++in_flight_;
  const ucs_status_ptr_t request = ucp_get_nbx(endpoint_, piece.to, piece.bytes, piece.from, rkey_, &param);
  if (!UCS_PTR_IS_PTR(request)) finish(batch, UCS_PTR_STATUS(request));
}

void Getter::got(void* request, ucs_status_t status, void* batch) {
  auto* it = static_cast<Batch*>(batch);
  it->getter_->finish(*it, status);
  ucp_request_free(request);
}

// The batch belongs to whoever has posted it as soon as it is done.
void Getter::finish(Batch& batch, ucs_status_t status) {
  --in_flight_;
  if (status != UCS_OK) {
    if (!abandoned_.exchange(true)) failed_(status);
    return;
  }
  if (--batch.left_) return;
  if (batch.word_at && batch.taken_ == batch.pieces.size()) {
    batch.taken_ = 0;  // the next one is the word, and the last
    words_.push_back(&batch);
    return;
  }
  batch.done_.store(true, std::memory_order_release);
}

}  // namespace blsrdma
