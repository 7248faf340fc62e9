// Hands on what a microphone hears, in pieces of float32[128].
registerProcessor('recorder', class extends AudioWorkletProcessor {
  process([[heard]]) {
    if (heard) this.port.postMessage(heard.slice());
    return true;
  }
});
