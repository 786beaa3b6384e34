// The chat: conversations, messages, what is sent and what streams in.

import { ApiError, streamChat } from "./api.js";
import { Conversations, readSettings, writeSettings } from "./conversations.js";
import { byId, make, plural } from "./dom.js";
import { codeBlock, copy, markdown } from "./markdown.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty", "thinking_budget"];
const TEXTS = ["system", "stop_text", "enable_thinking", "tools"];
const NEAR_END = 80; // pixels from the end within which new text is followed

export class Chat {
  constructor() {
    this.conversations = new Conversations();
    this.model = undefined;
    this.running = null; // an AbortController while an answer comes
    this.fillSettings(readSettings());
    this.listen();
    this.showAll();
  }

  setModel(name) {
    this.model = name;
  }

  announce(text) {
    byId("status").textContent = text;
  }

  // ---- what the reader does ---------------------------------------------------------------------------------------

  listen() {
    byId("composer").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    byId("input").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    });
    byId("input").addEventListener("input", fitInput);
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.open(null));
    byId("reset").addEventListener("click", () => { this.fillSettings({}); this.keepSettings(); });
    for (const name of [...NUMBERS, ...TEXTS]) byId(name).addEventListener("input", () => { touch(byId(name)); this.keepSettings(); });
    document.addEventListener("keydown", (event) => {
      if (byId("chat").hidden) return;
      if (event.key === "Escape" && this.running) this.stop();
      else if (event.altKey && event.code === "KeyN") { event.preventDefault(); this.open(null); }
      else if (event.altKey && event.code === "KeyR") { event.preventDefault(); this.regenerate(); }
      else if (event.key === "/" && document.activeElement === document.body) { event.preventDefault(); byId("input").focus(); }
    });
  }

  send() {
    const text = byId("input").value.trim();
    if (!text || this.running || this.readTools() === null) return;
    byId("input").value = "";
    fitInput();
    this.push({ role: "user", content: text });
    this.answer();
  }

  regenerate() {
    const { messages } = this.conversations.current;
    if (this.running || messages.at(-1)?.role !== "assistant") return;
    messages.pop();
    this.answer();
  }

  stop() {
    this.running?.abort();
  }

  /** Opens a conversation; null: a new one. */
  open(conversation) {
    this.stop();
    if (conversation) this.conversations.current = conversation;
    else this.conversations.add();
    this.showAll();
    byId("input").focus();
  }

  push(message) {
    this.conversations.current.messages.push(message);
    this.conversations.save();
    this.showAll();
  }

  // ---- an answer ---------------------------------------------------------------------------------------------------

  async answer() {
    const conversation = this.conversations.current;
    const body = this.body(conversation);
    if (!body) return;
    const message = { role: "assistant", content: "", reasoning: "", calls: [] };
    conversation.messages.push(message);
    this.running = new AbortController();
    this.showAll();
    this.announce("Answering");
    const began = performance.now();
    let isDue = false;
    const showSoon = () => {
      if (isDue) return;
      isDue = true;
      requestAnimationFrame(() => { isDue = false; if (conversation === this.conversations.current) this.showLast(); });
    };
    try {
      for await (const chunk of streamChat(body, this.running.signal)) {
        take(message, chunk, performance.now() - began);
        showSoon();
      }
    } catch (error) {
      if (error.name === "AbortError") message.end = "stopped";
      else if (error instanceof ApiError || error instanceof TypeError) message.error = error.message;
      else throw error;
    } finally {
      message.seconds = (performance.now() - began) / 1000;
      this.running = null;
      this.conversations.save();
      this.showAll();
      this.announce(message.error ? `Error: ${message.error}` : "Answer complete");
    }
  }

  /** The request; null where a setting is wrong. */
  body(conversation) {
    const body = { model: this.model, messages: [] };
    const system = byId("system").value.trim();
    if (system) body.messages.push({ role: "system", content: system });
    for (const message of conversation.messages) body.messages.push(...asSent(message));
    for (const name of NUMBERS) {
      const field = byId(name);
      if (field.value !== "" && !(field.dataset.optional !== undefined && !field.dataset.set)) body[name] = Number(field.value);
    }
    if (byId("stop_text").value) body.stop = [byId("stop_text").value];
    const thinking = byId("enable_thinking").value;
    if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "true" };
    const tools = this.readTools();
    if (tools) body.tools = tools;
    return tools === null ? null : body;
  }

  /** The tools of the settings; undefined for none, null for what is not JSON. */
  readTools() {
    byId("tools-note").textContent = "";
    if (!byId("tools").value.trim()) return undefined;
    try {
      return JSON.parse(byId("tools").value);
    } catch (error) {
      byId("tools-note").textContent = `Tools: ${error.message}`;
      return null;
    }
  }

  // ---- what is shown -----------------------------------------------------------------------------------------------

  showAll() {
    const { all, current } = this.conversations;
    byId("conversations").replaceChildren(...all.map((one) => make("li", { class: one === current ? "current" : "" },
      make("button", { class: "title", "aria-current": one === current ? "true" : "false", onclick: () => this.open(one) }, one.title || "New conversation"),
      make("button", { class: "remove", "aria-label": `Delete ${one.title || "conversation"}`, title: "Delete", onclick: () => { if (one === current) this.stop(); this.conversations.remove(one); this.showAll(); } }, "×"))));
    const { messages } = current;
    byId("messages").replaceChildren(...(messages.length ? messages.map((message, i) => this.show(message, i)) : [welcome(this)]));
    byId("stop").hidden = !this.running;
    byId("send").hidden = Boolean(this.running);
    toEnd();
  }

  showLast() {
    const list = byId("messages");
    const follows = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END;
    const { messages } = this.conversations.current;
    list.lastElementChild?.replaceWith(this.show(messages.at(-1), messages.length - 1));
    if (follows) toEnd();
  }

  show(message, index) {
    const { messages } = this.conversations.current;
    const isLast = index === messages.length - 1;
    const isComing = isLast && this.running && message.role === "assistant";
    const article = make("article", { class: `message ${message.role}`, "aria-label": message.role });
    if (message.role === "tool") article.append(make("small", {}, "Result"), make("pre", {}, message.content));
    else if (message.role === "user") article.append(make("p", { class: "plain" }, message.content));
    else {
      if (message.reasoning) article.append(thoughts(message, isComing && !message.content));
      article.append(...markdown(message.content));
      article.append(...(message.calls ?? []).map((call) => this.showCall(call, messages, !isComing)));
      if (isComing && !message.content && !message.reasoning && !message.calls.length) article.append(make("span", { class: "waiting", "aria-label": "Waiting" }, make("i"), make("i"), make("i")));
      if (message.error) article.append(make("p", { class: "error" }, message.error));
      if (!isComing) article.append(this.foot(message, isLast));
    }
    return article;
  }

  showCall(call, messages, isDone) {
    const shown = make("section", { class: "call", "aria-label": "Tool call" }, make("header", {}, make("span", { "aria-hidden": "true" }, "ƒ "), call.name), codeBlock(pretty(call.arguments), "arguments"));
    if (isDone && !messages.some((one) => one.role === "tool" && one.callId === call.id)) {
      const field = make("input", { type: "text", placeholder: "Its result …", "aria-label": `Result of ${call.name}`, required: true });
      shown.append(make("form", { class: "result", onsubmit: (event) => { event.preventDefault(); this.giveResult(call, field.value); } }, field, make("button", { class: "primary" }, "Give")));
    }
    return shown;
  }

  /** A call's result; the model goes on when all calls of its message have one. */
  giveResult(call, content) {
    this.push({ role: "tool", content, callId: call.id });
    const { messages } = this.conversations.current;
    const caller = messages.findLast((message) => message.calls?.includes(call));
    if (caller.calls.every((one) => messages.some((message) => message.callId === one.id))) this.answer();
  }

  foot(message, isLast) {
    const button = make("button", { class: "quiet", onclick: () => copy(message.content, button) }, "Copy");
    const foot = make("footer", {}, button);
    if (isLast) foot.append(make("button", { class: "quiet", onclick: () => this.regenerate(), title: "Answer again (Alt+R)" }, "Regenerate"));
    foot.append(make("span", {}, figuresOf(message)));
    return foot;
  }

  // ---- settings ----------------------------------------------------------------------------------------------------

  fillSettings(settings) {
    for (const name of [...NUMBERS, ...TEXTS]) {
      const field = byId(name);
      field.value = settings[name] ?? (field.dataset.optional === undefined ? "" : "1");
      if (field.dataset.optional !== undefined) delete field.dataset.set;
      if (settings[name] !== undefined) touch(field);
      else showValue(field);
    }
  }

  keepSettings() {
    const kept = {};
    for (const name of [...NUMBERS, ...TEXTS]) {
      const field = byId(name);
      if (field.dataset.optional !== undefined ? field.dataset.set : field.value) kept[name] = field.value;
    }
    writeSettings(kept);
  }
}

/** What a chunk adds to a message. */
function take(message, chunk, elapsed) {
  if (chunk.usage) message.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { delta } = choice;
  if (message.first === undefined && (delta.content || delta.reasoning_content || delta.tool_calls)) message.first = elapsed;
  message.content += delta.content ?? "";
  message.reasoning += delta.reasoning_content ?? "";
  for (const part of delta.tool_calls ?? []) {
    message.calls[part.index] ??= { id: part.id, name: "", arguments: "" };
    message.calls[part.index].name += part.function?.name ?? "";
    message.calls[part.index].arguments += part.function?.arguments ?? "";
  }
  if (choice.finish_reason) message.end = choice.finish_reason;
}

/** A message as the API wants it; one that failed is left out. */
function asSent(message) {
  if (message.role === "user") return [{ role: "user", content: message.content }];
  if (message.role === "tool") return [{ role: "tool", content: message.content, tool_call_id: message.callId }];
  const calls = (message.calls ?? []).map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  if (!message.content && !calls.length) return [];
  return [{ role: "assistant", content: message.content, ...(calls.length && { tool_calls: calls }) }];
}

function thoughts(message, isOpen) {
  const details = make("details", { class: "thoughts", open: isOpen || message.isUnfolded }, make("summary", {}, isOpen ? "Thinking …" : "Thoughts"), make("div", {}, ...markdown(message.reasoning)));
  details.querySelector("summary").addEventListener("click", () => { message.isUnfolded = !details.open; });
  return details;
}

function figuresOf(message) {
  const parts = [];
  const count = message.usage?.completion_tokens;
  if (count) parts.push(plural(count, "token"));
  if (count > 1 && message.seconds * 1000 > message.first) parts.push(`${((count - 1) / (message.seconds - message.first / 1000)).toFixed(1)} tokens/s`);
  if (message.first !== undefined) parts.push(`first after ${Math.round(message.first)} ms`);
  const cached = message.usage?.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${cached} of ${message.usage.prompt_tokens} prompt tokens cached`);
  if (message.end && message.end !== "stop" && message.end !== "tool_calls") parts.push(message.end === "length" ? "cut at its limit" : message.end);
  return parts.join(" · ");
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not whole yet
  }
}

function welcome(chat) {
  const asks = ["What is the capital of France?", "Write a haiku about the sea.", "Explain paged attention in two sentences."];
  const start = (text) => { byId("input").value = text; chat.send(); };
  return make("div", { class: "welcome" }, make("h2", {}, "What shall we talk about?"),
    make("div", { class: "asks" }, ...asks.map((text) => make("button", { onclick: () => start(text) }, text))));
}

function touch(field) {
  if (field.dataset.optional !== undefined) field.dataset.set = "true";
  showValue(field);
}

function showValue(field) {
  if (field.type === "range") field.parentElement.querySelector("output").textContent = field.dataset.set ? field.value : "default";
}

function fitInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
}

function toEnd() {
  byId("messages").scrollTop = byId("messages").scrollHeight;
}
