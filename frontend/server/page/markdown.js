// A small, safe part of Markdown: text becomes nodes, never HTML.

import { make } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|(?<!\w)\*(?=\S)([^*\n]*?[^*\s])\*(?!\w)|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

/** The nodes of a text. */
export function markdown(text) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = [];
  const endParagraph = () => {
    if (paragraph.length) blocks.push(make("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i += 1) {
    const fence = FENCE.exec(lines[i]);
    const heading = HEADING.exec(lines[i]);
    if (fence) {
      endParagraph();
      const code = [];
      for (i += 1; i < lines.length && !lines[i].trim().startsWith(fence[1]); i += 1) code.push(lines[i]);
      blocks.push(codeBlock(code.join("\n"), fence[2]));
    } else if (heading) {
      endParagraph();
      blocks.push(make(`h${Math.min(heading[1].length + 2, 6)}`, {}, ...inline(heading[2])));
    } else if (ITEM.test(lines[i])) {
      endParagraph();
      const start = ITEM.exec(lines[i])[1];
      const list = make(start ? "ol" : "ul", start ? { start } : {});
      for (; i < lines.length && ITEM.test(lines[i]); i += 1) list.append(make("li", {}, ...inline(ITEM.exec(lines[i])[2])));
      i -= 1;
      blocks.push(list);
    } else if (lines[i].trim()) paragraph.push(lines[i]);
    else endParagraph();
  }
  endParagraph();
  return blocks;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, , code, strong, emphasis, label, address] = found;
    nodes.push(text.slice(end, found.index));
    if (code !== undefined) nodes.push(make("code", {}, code.trim() || code));
    else if (strong !== undefined) nodes.push(make("strong", {}, ...inline(strong)));
    else if (emphasis !== undefined) nodes.push(make("em", {}, ...inline(emphasis)));
    else nodes.push(make("a", { href: address, rel: "noreferrer noopener", target: "_blank" }, label));
    end = found.index + whole.length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

/** Code with its language and a button that copies it. */
export function codeBlock(code, language) {
  const button = make("button", { type: "button", class: "copy", "aria-label": "Copy code", onclick: () => copy(code, button) }, "Copy");
  return make("figure", { class: "block" }, make("figcaption", {}, language || "code", button), make("pre", {}, make("code", {}, code)));
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // browsers give the clipboard to https and localhost only
  }
  setTimeout(() => { button.textContent = before; }, 1200);
}
