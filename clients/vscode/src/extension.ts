/** midfill in VS Code: finds and starts the server, and adds the commands. VS Code itself draws ghost text. */

import * as vscode from "vscode";

import * as choices from "./choices.js";
import { Configuration, SECTION } from "./configuration.js";
import { explainLast, Pages, SCHEME } from "./explanation.js";
import { Installation, type Server } from "./installation.js";
import { Programs } from "./programs.js";
import { Session } from "./session.js";
import { StatusBar } from "./statusbar.js";

const DEFAULT_MODEL = "qwen2.5-coder-0.5b";

class Extension {
  private readonly configuration: Configuration;
  private readonly programs: Programs;
  private readonly installation: Installation;
  private readonly session: Session;
  private readonly log = vscode.window.createOutputChannel("midfill", { log: true });
  private readonly pages = new Pages();
  private server: Server | undefined;
  private offered: string | undefined;
  /** The user has agreed to the download of the model when the server was not yet installed. */
  private agreed = false;

  constructor(context: vscode.ExtensionContext) {
    this.configuration = new Configuration(context.extension.packageJSON);
    this.programs = new Programs(context.globalStorageUri.fsPath);
    this.session = new Session(this.configuration, this.log, this.programs);
    this.installation = new Installation(context, this.programs, this.session, this.log);
    context.subscriptions.push(
      this.log,
      this.session,
      new StatusBar(this.session, this.configuration),
      vscode.workspace.registerTextDocumentContentProvider(SCHEME, this.pages),
      vscode.workspace.onDidChangeConfiguration((event) => {
        void this.guard(() => this.configured(event));
      }),
      vscode.workspace.onDidChangeWorkspaceFolders(() => {
        void this.guard(() => this.session.foldersChanged());
      }),
      this.session.onDidChange(() => {
        void this.guard(() => this.changed());
      }),
      this.session.onDidSuggest(
        () => void vscode.commands.executeCommand("setContext", "midfill.suggested", true),
      ),
    );
    const commandLine = { command: () => this.commandLine(), programs: this.programs };
    const commands: Record<string, () => Promise<void>> = {
      menu: () => choices.menu(this.session),
      toggle: () => choices.toggle(this.session, this.configuration),
      toggleLanguage: () => choices.toggleLanguage(this.configuration),
      snooze: () => choices.snooze(this.session),
      chooseModel: () => choices.chooseModel(commandLine, this.configuration, this.session, this.log),
      chooseAdapter: () => choices.chooseAdapter(commandLine, this.configuration),
      explainLast: () => explainLast(this.session, this.pages),
      restart: () => this.start(),
      installServer: () => this.install(),
      downloadModel: () => this.download(),
      showLog: () => {
        this.log.show();
        return Promise.resolve();
      },
      openSettings: async () => {
        await vscode.commands.executeCommand("workbench.action.openSettings", `@ext:${context.extension.id}`);
      },
    };
    for (const [name, command] of Object.entries(commands)) {
      const guarded = () => this.guard(command);
      context.subscriptions.push(vscode.commands.registerCommand(`${SECTION}.${name}`, guarded));
    }
  }

  /** Finds the server and starts it, or offers to install one. */
  async start(): Promise<void> {
    this.server = await this.installation.find(this.configuration.get<string[]>("server.command", []));
    if (this.server === undefined) {
      await this.session.stop({ kind: "missing" });
      void this.guard(() => this.offer());
      return;
    }
    if (this.server.own && (await this.installation.isOutdated())) {
      await this.installation.install();
    }
    await this.session.start(this.server.command);
  }

  async stop(): Promise<void> {
    await this.session.stop({ kind: "starting" });
  }

  private async offer(): Promise<void> {
    const model = this.configuration.get<string>("model", DEFAULT_MODEL);
    const size = model === DEFAULT_MODEL ? ", 0.5 GB" : "";
    const message =
      "midfill: The server is not installed: there is no midfill on the PATH. The extension can install it in a " +
      `separate Python environment (1.6 GB or more, in ${this.installation.folder}) and download the model ` +
      `(${model}${size}). Nothing has been fetched yet.`;
    const chosen = await vscode.window.showInformationMessage(message, "Install", "Settings");
    // The message may have been there for long: the server may be here by now.
    if (chosen === "Install" && this.session.state.kind === "missing" && this.session.work === undefined) {
      // One answer for both downloads.
      this.agreed = true;
      await this.install();
    } else if (chosen === "Settings") {
      await vscode.commands.executeCommand("workbench.action.openSettings", "midfill.server.command");
    }
  }

  private async install(): Promise<void> {
    let installed = false;
    try {
      installed = await this.installation.install();
    } finally {
      // An installation that was cancelled or failed takes the answer about the model back, too.
      this.agreed = this.agreed && installed;
    }
    if (installed) {
      await this.start();
    }
  }

  /** Downloads the model that is chosen, and starts the server with it. */
  private async download(): Promise<void> {
    const { state } = this.session;
    if (this.server === undefined || !("status" in state)) {
      return;
    }
    const { command } = this.server;
    if (await choices.pull(this.programs, command, state.status.model, this.session, this.log)) {
      await this.start();
    }
  }

  private async commandLine(): Promise<string[] | undefined> {
    if (this.server === undefined) {
      await this.offer();
    }
    return this.server?.command;
  }

  private async configured(event: vscode.ConfigurationChangeEvent): Promise<void> {
    switch (this.configuration.change(event)) {
      case "restart":
        await this.start();
        break;
      case "tell":
        await this.session.configure();
        break;
      case "nothing":
        break;
    }
  }

  private async changed(): Promise<void> {
    const { state } = this.session;
    const runs = "status" in state;
    void vscode.commands.executeCommand("setContext", "midfill.running", runs);
    void vscode.commands.executeCommand("setContext", "midfill.ready", state.kind === "ready");
    if (state.kind !== "failed" || state.status.modelMissing !== true || this.server === undefined) {
      return;
    }
    // Offer each model once only.
    const { model } = state.status;
    if (this.offered === model) {
      return;
    }
    this.offered = model;
    const agreed = this.agreed;
    this.agreed = false;
    const isMissing = () => {
      const now = this.session.state;
      return now.kind === "failed" && now.status.model === model && this.session.work === undefined;
    };
    if ((agreed || (await choices.offerModel(this.programs, this.server.command, model))) && isMissing()) {
      await this.download();
    }
  }

  /** Runs work; shows and logs an error. */
  private async guard(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      this.log.error(message);
      if ((await vscode.window.showErrorMessage(`midfill: ${message}`, "Show Log")) === "Show Log") {
        this.log.show();
      }
    }
  }
}

let extension: Extension | undefined;

export function activate(context: vscode.ExtensionContext): void {
  extension = new Extension(context);
  void vscode.commands.executeCommand("midfill.restart");
}

export async function deactivate(): Promise<void> {
  await extension?.stop();
}
