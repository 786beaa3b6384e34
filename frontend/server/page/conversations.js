// Conversations and settings, kept in this browser.

const CONVERSATIONS = "folovllm.conversations";
const SETTINGS = "folovllm.settings";
const MAX_TITLE = 48;

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // written by something else, or the browser keeps nothing
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const readSettings = () => read(SETTINGS, {});
export const writeSettings = (settings) => write(SETTINGS, settings);

export class Conversations {
  constructor() {
    const kept = read(CONVERSATIONS, []);
    this.all = Array.isArray(kept) ? kept.filter((one) => Array.isArray(one?.messages)) : [];
    if (!this.all.length) this.add();
    this.current = this.all[0];
  }

  add() {
    const empty = this.all.find((one) => !one.messages.length);
    this.current = empty ?? { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [] };
    this.all = [this.current, ...this.all.filter((one) => one !== this.current)];
  }

  remove(conversation) {
    this.all = this.all.filter((one) => one !== conversation);
    if (!this.all.length) this.add();
    if (conversation === this.current) this.current = this.all[0];
    this.save();
  }

  /** Writes all of them; where the browser's room is used up, the oldest ones go. */
  save() {
    const first = this.current.messages.find((message) => message.role === "user");
    if (first && !this.current.title) this.current.title = first.content.trim().slice(0, MAX_TITLE);
    while (!write(CONVERSATIONS, this.all) && this.all.length > 1) {
      this.all.splice(this.all.findLastIndex((one) => one !== this.current), 1);
    }
  }
}
