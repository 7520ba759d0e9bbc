"""Group relative policy optimization: sampling, rewards, advantages, the objective and its trainer."""
