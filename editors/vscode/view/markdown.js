// Markdown to elements. Text of the model only ever becomes text nodes: what looks like HTML, or a control code, stays what it is.
const KEYWORDS = new Set(("abstract as async await break case catch class const continue def default defer del do elif else enum except export extends " +
  "extern false False final finally fn for from func function go if impl import in instanceof interface is lambda let loop match mod module mut new nil " +
  "None not null or pass private protected public pub raise return self static struct super switch this throw trait true True try type typedef typeof " +
  "union unsafe use var void where while with yield int float double char bool string and").split(" "));
const TOKEN = /(\/\/[^\n]*|#[^\n]*|\/\*[\s\S]*?(?:\*\/|$))|("""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|`(?:\\.|[^`\\])*`?)|(\b\d[\w.]*)|([A-Za-z_]\w*)/g;
const FENCE = /^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*$/;
const INLINE = /(`+)([\s\S]+?)\1|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Without control codes. */
export const plain = text => text.replace(/\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]/g, "");

/** `buttons(text)` gives the elements that stand above a code block. */
export function render(text, buttons) {
  const out = document.createDocumentFragment(), lines = plain(text).split("\n");
  for (let i = 0; i < lines.length;) {
    const fence = FENCE.exec(lines[i]), heading = /^(#{1,6})\s+(.*)/.exec(lines[i]);
    if (fence) {
      const end = lines.findIndex((line, j) => j > i && line.trim().startsWith(fence[1]) && !line.trim().slice(fence[1].length).replace(/[`~]/g, ""));
      const code = lines.slice(i + 1, end < 0 ? undefined : end).join("\n").trimEnd() + "\n";
      out.append(element("div", "block", element("div", "bar", element("span", "", fence[2]), ...buttons(code)), element("pre", "", highlighted(code))));
      i = end < 0 ? lines.length : end + 1;
    } else if (heading) {
      out.append(element(`h${Math.min(heading[1].length + 2, 6)}`, "", ...inline(heading[2])));
      i++;
    } else if (/^\s*([-*+]|\d+[.)])\s+/.test(lines[i])) {
      const list = element(/^\s*\d/.test(lines[i]) ? "ol" : "ul");
      for (; i < lines.length && /^\s*([-*+]|\d+[.)])\s+/.test(lines[i]); i++) list.append(element("li", "", ...inline(lines[i].replace(/^\s*([-*+]|\d+[.)])\s+/, ""))));
      out.append(list);
    } else if (lines[i].trim()) {
      let j = i;
      while (j < lines.length && lines[j].trim() && !FENCE.test(lines[j]) && !/^(#{1,6}\s|\s*([-*+]|\d+[.)])\s)/.test(lines[j])) j++;
      out.append(element("p", "", ...inline(lines.slice(i, Math.max(j, i + 1)).join("\n"))));
      i = Math.max(j, i + 1);
    } else {
      i++;
    }
  }
  return out;
}

function inline(text) {
  const out = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    out.push(text.slice(last, match.index));
    out.push(match[2] !== undefined ? element("code", "", match[2]) : element(match[3] !== undefined ? "strong" : "em", "", match[3] ?? match[4]));
    last = match.index + match[0].length;
  }
  return [...out, text.slice(last)];
}

function highlighted(code) {
  const out = element("code");
  let last = 0;
  for (const match of code.matchAll(TOKEN)) {
    const kind = match[1] ? "comment" : match[2] ? "string" : match[3] ? "number" : KEYWORDS.has(match[4]) ? "keyword" : "";
    if (!kind) continue;
    out.append(code.slice(last, match.index), element("span", kind, match[0]));
    last = match.index + match[0].length;
  }
  out.append(code.slice(last));
  return out;
}
