// Draws the conversation that the extension keeps, and tells it what somebody does.
import { plain, render } from "./markdown.js";

const vscode = acquireVsCodeApi();
const [log, form, controls, question, send, stop] = ["log", "form", "controls", "question", "send", "stop"].map(id => document.getElementById(id));
let text = "", body, thoughts, frame;   // of the answer that is being written

function button(label, type, value) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.className = "quiet";
  made.onclick = () => vscode.postMessage({ type, text: value });
  return made;
}

const codeButtons = code => [button("Copy", "copy", code), button("Insert", "insert", code), button("Apply", "apply", code)];

function line(className, content) {
  const made = document.createElement("p");
  made.className = className;
  made.textContent = content;
  return made;
}

function turnElement(turn, last, running) {
  const made = document.createElement("article");
  made.className = turn.role;
  if (turn.role === "user") {
    made.append(line("question", turn.content));
    return made;
  }
  if (turn.note) made.append(line("note", turn.note));
  const reasoning = reasoningElement(turn.reasoning), content = document.createElement("div");
  content.className = "answer";
  content.append(render(turn.content, codeButtons));
  made.append(reasoning, content);
  if (turn.error) made.append(line("error", turn.error), ...(last ? [button("Retry", "retry")] : []));
  made.dataset.done = String(!(last && running));
  if (last) [body, text, thoughts] = [content, turn.content, reasoning];
  return made;
}

/** What the model thought before it answered: folded, and not there if it did not. */
function reasoningElement(content = "") {
  const made = document.createElement("details"), summary = document.createElement("summary");
  made.className = "reasoning";
  made.hidden = !content;
  summary.textContent = "Reasoning";
  made.append(summary, plain(content));
  return made;
}

function draw({ turns, running }) {
  body = undefined;
  log.replaceChildren(...turns.map((turn, i) => turnElement(turn, i === turns.length - 1, running)));
  stop.hidden = !running;
  send.hidden = running;
  log.scrollTop = log.scrollHeight;
}

function think(delta) {
  if (!thoughts) return;
  thoughts.hidden = false;
  thoughts.append(plain(delta));
}

/** However many pieces come, the answer is drawn once for each picture on the screen. */
function append(delta) {
  text += delta;
  frame ??= requestAnimationFrame(() => {
    frame = undefined;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    body?.replaceChildren(render(text, codeButtons));
    if (atEnd) log.scrollTop = log.scrollHeight;
  });
}

addEventListener("message", ({ data }) => ({ draw, delta: append, reasoning: think })[data.type](data.type === "draw" ? data : data.text));
form.onsubmit = event => {
  event.preventDefault();
  if (!question.value.trim() || send.hidden) return;
  vscode.postMessage({ type: "ask", text: question.value });
  question.value = "";
};
question.onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "Escape") {
    vscode.postMessage({ type: "stop" });
  }
};
stop.onclick = () => vscode.postMessage({ type: "stop" });
document.getElementById("new").onclick = () => { vscode.postMessage({ type: "new" }); question.focus(); };
controls.disabled = false;
question.focus();
vscode.postMessage({ type: "ready" });
