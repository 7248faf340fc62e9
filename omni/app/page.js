// What is done on the page goes to its server: text, a number or the bytes of a picture. Back come parts of the page, as
// lines of JSON: {id of an element: its HTML}.

const visit = fetch('visits', {method: 'POST'}).then(said => said.ok ? said.text() : Promise.reject(said));
const at = id => document.getElementById(id);

function show(parts) {
  for (const [id, part] of Object.entries(parts)) {
    if (id === 'question') at(id).value = part;
    else at(id).innerHTML = part;
  }
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
    together = await send(`pictures?${query}`, file, gather) || together;
  }
}

document.addEventListener('click', async event => {
  const {pick, remove, word} = event.target.closest('button')?.dataset ?? {};
  if (pick) send(`examples/${pick}?together=${at('together').checked}`);
  if (remove) send(`remove/${remove}`);
  if (word) {
    await send(`look/${word}`);
    document.querySelector('.pictures')?.scrollIntoView({block: 'nearest', behavior: 'smooth'}); // on a phone it is above
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

let token;
visit.then(mine => token = mine);
addEventListener('pagehide', () => token && fetch('visits', {method: 'DELETE', headers: {Visit: token}, keepalive: true}));
addEventListener('pageshow', event => event.persisted && location.reload()); // what it shows is forgotten
