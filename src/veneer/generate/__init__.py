"""Text from prompts: batched decoding, sampling, stopping, chat."""
