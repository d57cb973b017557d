// Hands on what a microphone gives, as it comes: the mean of its channels.
registerProcessor("recorder", class extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) {
      const wave = new Float32Array(channels[0].length);
      for (const channel of channels) channel.forEach((value, i) => { wave[i] += value / channels.length; });
      this.port.postMessage(wave, [wave.buffer]);
    }
    return true;
  }
});
