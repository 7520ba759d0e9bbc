"""The GRPO loss of a toy policy: 30 updates raise the log-probs of the responses with a positive advantage."""

import torch
from vcr1_kernels import linear_grpo_loss

torch.manual_seed(0)
hidden = torch.randn(12, 64)  # [response tokens, hidden_size]: two responses of 6 tokens
weight = torch.zeros(1000, 64, requires_grad=True)  # [vocab_size, hidden_size]: the head, which is trained
target_ids = torch.randint(1000, (12,))
advantages = torch.tensor([1.0, -1.0]).repeat_interleave(6)  # the first response is better than the second
token_weights = torch.full((12,), 1 / 12)  # mean over all tokens
optimizer = torch.optim.AdamW([weight], lr=1e-2)

for _ in range(30):
    result = linear_grpo_loss(hidden, weight, target_ids, advantages, token_weights=token_weights)
    optimizer.zero_grad()
    result.loss.backward()  # the logits [12, 1000] are never stored whole
    optimizer.step()
better, worse = result.log_probs.view(2, 6).mean(dim=1).tolist()
print(f"mean log-prob of the better response {better:.2f}, of the worse one {worse:.2f}")
