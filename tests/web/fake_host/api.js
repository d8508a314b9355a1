/** ComfyUI's `api` as far as the pack uses it: routes that tests answer, and events that tests send. */

class FakeApi extends EventTarget {
  constructor() {
    super();
    /** @type {[string, any, any][]} */
    this.listeners = [];
    this.reset();
  }

  /** @param {string} event @param {any} listener @param {any} [options] */
  addEventListener(event, listener, options) {
    this.listeners.push([event, listener, options]);
    super.addEventListener(event, listener, options);
  }

  /** As a page that was loaded anew. */
  reset() {
    for (const [event, listener, options] of this.listeners) this.removeEventListener(event, listener, options);
    this.listeners = [];
    /** What was asked, in order. @type {{path: string, body: any}[]} */
    this.requests = [];
    /** Answers by path: a value, or a function of the body. @type {Record<string, any>} */
    this.answers = {};
    this.away = false;
  }

  /** @param {string} path @param {{body?: string}} [options] */
  async fetchApi(path, options) {
    const body = options?.body === undefined ? undefined : JSON.parse(options.body);
    this.requests.push({ path, body });
    if (this.away) throw new TypeError("Failed to fetch");
    const known = this.answers[path];
    const answer = typeof known === "function" ? await known(body) : known;
    if (answer === undefined) return new Response("not found", { status: 404 });
    return answer instanceof Response ? answer : Response.json(answer);
  }

  /** Sends an event as the websocket does. @param {string} event @param {any} [detail] */
  send(event, detail) {
    this.dispatchEvent(new CustomEvent(event, { detail, cancelable: true }));
  }

  /** Bodies that were posted to a path. @param {string} path */
  posted(path) {
    return this.requests.filter((request) => request.path === path && request.body !== undefined).map(({ body }) => body);
  }
}

export const api = new FakeApi();
