/** Where the server is, and how it is installed where it is not: into an environment of the extension's own. */

import { createHash } from "node:crypto";
import { promises as fs } from "node:fs";
import * as path from "node:path";
import * as vscode from "vscode";

import { find, ISOLATED, type Programs, WINDOWS } from "./programs.js";

const PYTHONS = [
  ...[14, 13, 12, 11].map((minor) => [`python3.${minor}`]),
  ["python3"],
  ["python"],
  ...(WINDOWS ? [["py", "-3"]] : []),
];
const OLDEST = "3.11";
// Prints the version if it will do and can make environments.
const PROBE =
  "import sys, venv, ensurepip; sys.version_info >= (3, 11) or sys.exit(1); print(sys.version.split()[0])";

export interface Server {
  /** Program and arguments of midfill's command line. */
  command: string[];
  /** Whether it is the environment that the extension has made. */
  own: boolean;
}

export class Installation {
  private readonly folder: string;
  private readonly program: string;
  private readonly mark: string;

  constructor(
    private readonly extension: vscode.ExtensionContext,
    private readonly programs: Programs,
    private readonly log: vscode.LogOutputChannel,
  ) {
    this.folder = path.join(extension.globalStorageUri.fsPath, "server");
    this.program = path.join(this.folder, ...(WINDOWS ? ["Scripts", "midfill.exe"] : ["bin", "midfill"]));
    this.mark = path.join(this.folder, "installed");
  }

  /** The server that the user named, else the one on PATH, else the extension's own. */
  async find(named: string[]): Promise<Server | undefined> {
    if (named.length > 0) {
      return { command: named, own: false };
    }
    const onPath = await find("midfill");
    if (onPath !== undefined) {
      return { command: [onPath], own: false };
    }
    return (await this.installed()) === undefined ? undefined : { command: [this.program], own: true };
  }

  /** Whether the extension's own server is another one than the extension brings. */
  async isOutdated(): Promise<boolean> {
    return (await this.installed()) !== (await this.bundled()).digest;
  }

  /** Makes the environment, or brings it up to date. False if the user took it back; throws what went wrong. */
  async install(): Promise<boolean> {
    const python = await this.findPython();
    if (python === undefined) {
      throw new Error(
        `There is no Python ${OLDEST} or newer here that can make environments. Install Python` +
          (process.platform === "linux" ? " with its venv module (python3-venv)" : "") +
          ", or name a server in the setting midfill.server.command.",
      );
    }
    const options = {
      location: vscode.ProgressLocation.Notification,
      title: "Installing midfill's server",
      cancellable: true,
    };
    return vscode.window.withProgress(options, (progress, token) => this.fill(python, progress, token));
  }

  private async fill(
    python: string[],
    progress: vscode.Progress<{ message: string }>,
    token: vscode.CancellationToken,
  ): Promise<boolean> {
    const bundled = await this.bundled();
    await fs.mkdir(path.dirname(this.folder), { recursive: true });
    // Without the mark an environment is not used, so that one that was begun only is made again.
    await fs.rm(this.mark, { force: true });
    const isCancelled = () => token.isCancellationRequested;
    const step = async (message: string, command: string[]) => {
      if (isCancelled()) {
        return;
      }
      progress.report({ message });
      this.log.info(command.join(" "));
      const errors: string[] = [];
      const told = (line: string) => {
        this.log.info(line);
        if (line.startsWith("ERROR:")) {
          errors.push(line);
        }
        const what = /^\s*(Collecting|Downloading|Installing collected packages)(?:[: ]+)([\w.-]*)/.exec(
          line,
        );
        if (what !== null) {
          progress.report({ message: what[1]?.startsWith("I") ? "installing packages" : (what[2] ?? "") });
        }
      };
      const { status } = await this.programs.run(command, told, token);
      if (status !== 0 && !isCancelled()) {
        throw new Error(`The installation failed. ${errors.at(-1) ?? "The log says why."}`);
      }
    };
    await step("making an environment", [...python, ISOLATED, "-m", "venv", "--clear", this.folder]);
    const pip = path.join(path.dirname(this.program), WINDOWS ? "python.exe" : "python");
    const quietly = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"];
    // A wheel is only unpacked; a source package would run what its author has put into it.
    const options = [...quietly, "--only-binary", ":all:"];
    await step("fetching packages", [pip, ISOLATED, "-m", "pip", "install", ...options, bundled.wheel]);
    if (isCancelled()) {
      return false;
    }
    await fs.writeFile(this.mark, bundled.digest);
    return true;
  }

  private async installed(): Promise<string | undefined> {
    return fs.readFile(this.mark, "utf8").catch(() => undefined);
  }

  /** The server as the extension brings it. */
  private async bundled(): Promise<{ wheel: string; digest: string }> {
    const folder = this.extension.asAbsolutePath("server");
    const name = (await fs.readdir(folder)).find((entry) => entry.endsWith(".whl"));
    if (name === undefined) {
      throw new Error(`The extension is damaged: there is no server in ${folder}.`);
    }
    const wheel = path.join(folder, name);
    return {
      wheel,
      digest: createHash("sha256")
        .update(await fs.readFile(wheel))
        .digest("hex"),
    };
  }

  private async findPython(): Promise<string[] | undefined> {
    for (const [name = "", ...args] of PYTHONS) {
      const python = [name, ...args];
      // There is none by this name, or it is no Python that will do.
      const ended = await this.programs.run([...python, ISOLATED, "-c", PROBE]).catch(() => undefined);
      if (ended?.status === 0) {
        return python;
      }
    }
    return undefined;
  }
}
