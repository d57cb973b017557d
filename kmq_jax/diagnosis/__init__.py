"""Where low-bit errors come from: by layer, component, trial, utterance and speaker; and a report of it."""
