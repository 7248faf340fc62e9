// What is done on the page goes to its server: text, a number or the bytes of a file. Back come parts of the page, as
// lines of JSON: {id of an element: its HTML}.

const visit = fetch('visits', {method: 'POST'}).then(said => said.ok ? said.text() : Promise.reject(said));
const at = id => document.getElementById(id);

function show(parts) {
  const [held] = Object.entries(document.activeElement.dataset); // the button that a keyboard is at may be made anew
  for (const [id, part] of Object.entries(parts)) {
    if (id === 'question') at(id).value = part;
    else if (at(id)) at(id).innerHTML = part;
  }
  document.querySelectorAll('[data-play]:not([src])').forEach(play);
  if (held && document.activeElement === document.body) {
    (document.querySelector(`[data-${held[0]}="${held[1]}"]`) ?? at('files')).focus();
  }
}

const played = {}; // by their key, the addresses that files have in this browser

async function play(player) {
  const {play: key} = player.dataset, headers = {Visit: await visit};
  played[key] ??= fetch(`items/${key}`, {headers}).then(said => said.blob()).then(URL.createObjectURL);
  player.src = await played[key];
}

async function send(path, body, shown = show) {
  try {
    const said = await fetch(path, {method: 'POST', headers: {Visit: await visit}, body});
    const text = said.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = '', part; !(part = await text.read()).done;) {
      const lines = (rest + part.value).split('\n');
      rest = lines.pop();
      for (const line of lines) shown(JSON.parse(line));
    }
    return said.ok;
  } catch {
    show({notice: '<p>The server of this page does not answer; see whether it runs, and load the page again.</p>'});
    return false;
  }
}

async function choose(files) {
  let together = at('together').checked, refused = '';
  for (const file of files) {
    const query = new URLSearchParams({name: file.name, together});
    const gather = parts => show({...parts, notice: refused += parts.notice});
    together = await send(`items?${query}`, file, gather) || together;
  }
}

document.addEventListener('click', async event => {
  const {pick, remove, word} = event.target.closest('button')?.dataset ?? {};
  if (pick) send(`examples/${pick}?together=${at('together').checked}`);
  if (remove) send(`remove/${remove}`);
  if (word) {
    await send(`look/${word}`);
    document.querySelector('.items')?.scrollIntoView({block: 'nearest', behavior: 'smooth'}); // on a phone it is above
  }
});

const ask = document.forms[0], question = at('question');
ask.addEventListener('submit', event => {
  event.preventDefault();
  send('ask', question.value);
});
question.addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask.requestSubmit();
});

at('files')?.addEventListener('change', ({target}) => {
  choose([...target.files]);
  target.value = ''; // the same file may be chosen again
});

const paper = document.querySelector('canvas');
if (paper) {
  const pen = paper.getContext('2d');
  let drawn;
  const clear = () => {
    drawn = false;
    pen.fillStyle = 'white';
    pen.fillRect(0, 0, paper.width, paper.height);
  };
  const line = ({offsetX, offsetY}, start = 0) => {
    const scale = paper.width / paper.clientWidth, x = offsetX * scale, y = offsetY * scale;
    if (start) pen.moveTo(x + start, y); // a dot is a very short line
    pen.lineTo(x, y);
    pen.stroke();
    pen.beginPath();
    pen.moveTo(x, y);
  };
  clear();
  Object.assign(pen, {lineWidth: 16, lineCap: 'round', lineJoin: 'round'});
  paper.addEventListener('pointerdown', event => {
    paper.setPointerCapture(event.pointerId);
    pen.strokeStyle = document.querySelector('[name=color]:checked').value;
    pen.beginPath();
    line(event, 0.01);
    drawn = true;
  });
  paper.addEventListener('pointermove', event => paper.hasPointerCapture(event.pointerId) && line(event));
  at('clear').addEventListener('click', clear);
  at('draw').addEventListener('click', () => {
    if (drawn) paper.toBlob(file => choose([new File([file], 'drawing')]));
    else show({notice: '<p>There is no drawing yet; draw something, and use it then.</p>'});
  });
}

const record = at('record');
if (record) {
  const label = record.textContent, longest = 30; // seconds
  let end;
  record.addEventListener('click', async () => {
    if (end) return end();
    const ended = new Promise(resolve => end = resolve), sound = [];
    let microphone, context, samples = 0;
    record.textContent = 'Waiting for the microphone';
    try {
      microphone = await navigator.mediaDevices.getUserMedia({audio: true});
      context = new AudioContext();
      await context.audioWorklet.addModule('recorder.js');
      const recorder = new AudioWorkletNode(context, 'recorder');
      recorder.port.onmessage = ({data}) => {
        if (!end) return;
        sound.push(Int16Array.from(data, value => 32767 * Math.max(-1, Math.min(1, value))));
        samples += data.length;
        record.textContent = `Stop, and use the recording (${Math.floor(samples / context.sampleRate)} of ${longest} s)`;
        if (samples >= longest * context.sampleRate) end();
      };
      context.createMediaStreamSource(microphone).connect(recorder).connect(context.destination); // which stays silent
      await ended;
    } catch ({name}) {
      show({notice: `<p>The browser gives no microphone (${name}); allow it, open the page as localhost or over HTTPS, or upload a file.</p>`});
    }
    microphone?.getTracks().forEach(track => track.stop());
    context?.close();
    record.textContent = label;
    end = undefined;
    if (samples) choose([new File([wav(samples, context.sampleRate), ...sound], 'recording', {type: 'audio/wav'})]);
  });
}

// The header of a WAV file: so many samples, each of 16 bits, of one channel.
function wav(samples, rate) {
  const [riff, wave, form, data] = [0x46464952, 0x45564157, 0x20746d66, 0x61746164]; // their letters, the last one first
  return Uint32Array.of(riff, 36 + 2 * samples, wave, form, 16, 1 | 1 << 16, rate, 2 * rate, 2 | 16 << 16, data, 2 * samples);
}

let token;
visit.then(mine => token = mine);
addEventListener('pagehide', () => token && fetch('visits', {method: 'DELETE', headers: {Visit: token}, keepalive: true}));
addEventListener('pageshow', event => event.persisted && location.reload()); // what it shows is forgotten
