;;; midfill-server.el --- Connections to the midfill server  -*- lexical-binding: t -*-

;; Copyright the midfill authors
;; SPDX-License-Identifier: Apache-2.0

;; Author: The midfill authors

;;; Commentary:

;; Ghost text needs a connection to a server that knows the buffer's text.  There are three kinds
;; (`midfill-client'):
;;
;; - `own': a separate process, one for all buffers, so that the model is in memory once.  It runs
;;   beside Eglot or lsp-mode in the buffer; Eglot itself supports one server per buffer only.
;; - `eglot': the server that Eglot runs for the buffer, if it offers inline completion.
;; - `lsp-mode': an add-on client of lsp-mode.
;;
;; This file knows processes, documents and messages; it knows nothing about what is shown.

;;; Code:

(require 'cl-lib)
(require 'jsonrpc)
(require 'project)
(require 'subr-x)
(require 'url-util)

(defvar midfill-mode)
(defvar lsp--cur-workspace)
(declare-function eglot--TextDocumentPositionParams "eglot")
(declare-function eglot--signal-textDocument/didChange "eglot")
(declare-function eglot--capabilities "eglot")
(declare-function eglot-current-server "eglot")
(declare-function eglot-ensure "eglot")
(declare-function eglot-reconnect "eglot")
(declare-function jsonrpc--async-request-1 "jsonrpc")
(declare-function lsp "lsp-mode")
(declare-function lsp--text-document-position-params "lsp-mode")
(declare-function lsp-cancel-request-by-token "lsp-mode")
(declare-function lsp-find-workspace "lsp-mode")
(declare-function lsp--workspace-status "lsp-mode")
(declare-function lsp-notify "lsp-mode")
(declare-function lsp-on-progress-modeline "lsp-mode")
(declare-function lsp-register-client "lsp-mode")
(declare-function lsp-request-async "lsp-mode")
(declare-function lsp-stdio-connection "lsp-mode")
(declare-function lsp-workspace-restart "lsp-mode")
(declare-function make-lsp-client "lsp-mode")

(defgroup midfill nil
  "Code completion on your own machine, shown as ghost text."
  :group 'completion
  :prefix "midfill-")

(defcustom midfill-client 'own
  "How Emacs is connected to the server.
A change takes effect in buffers where `midfill-mode' is switched on
afterwards."
  :type '(choice (const :tag "Separate process, beside Eglot and lsp-mode" own)
                 (const :tag "Eglot, with midfill as the buffer's server" eglot)
                 (const :tag "lsp-mode, as an add-on server" lsp-mode)))

(defcustom midfill-command '("midfill" "serve")
  "The program that starts the server, and its arguments.
A name is searched for in the variable `exec-path', except in its relative
folders.  The server is started in the folder of this package."
  :type '(repeat string)
  :risky t)

(defcustom midfill-settings nil
  "Settings of the server, as a property list.
The names are those of server/docs/settings.md, as keywords; false is
`:json-false'.  For example: (:eagerness \"low\" :prefetch :json-false)"
  :type '(plist :key-type symbol)
  :risky t)

(defconst midfill-server--pauses '(0.25 1 4)
  "Seconds before a crashed server is restarted; after the last one it stays off.")

(defconst midfill-server--recovered 600
  "A server that has run for this many seconds resets the count of crashes.")

(defconst midfill-server--languages
  '((c++-mode . "cpp") (c++-ts-mode . "cpp") (sh-mode . "shellscript") (bash-ts-mode . "shellscript")
    (js-jsx-mode . "javascriptreact") (tsx-ts-mode . "typescriptreact") (mhtml-mode . "html")
    (latex-mode . "latex") (LaTeX-mode . "latex") (cperl-mode . "perl") (enh-ruby-mode . "ruby")
    (js2-mode . "javascript") (csharp-mode . "csharp") (tuareg-mode . "ocaml") (conf-toml-mode . "toml"))
  "Language identifiers that differ from the name of the major mode.")

(defvar midfill-server-state 'stopped
  "State of the server: the separate process, or that of lsp-mode.
One of `stopped', `missing', `starting', `loading', `ready', `failed',
`restarting' and `given-up'.")

(defvar midfill-server-percentage nil
  "Loading progress in per cent; nil if unknown.")

(defvar midfill-server-model nil
  "Name of the model, if known.")

(defvar midfill-server-version nil
  "Version of the server, if known.")

(defvar midfill-server-ready-hook nil
  "Run when the model is ready.")

(defvar midfill-server-gone-hook nil
  "Run when the connection is lost.")

(defvar midfill-server--own nil
  "The connection to the separate server.")

(defvar midfill-server--initialized nil
  "Non-nil if `midfill-server--own' has answered `initialize'.")

(defvar midfill-server--started 0.0
  "Time at which the server was started, in seconds.")

(defvar midfill-server--deaths 0
  "Number of crashes since the server last ran for long.")

(defvar midfill-server--folders nil
  "URIs of the folders that the server knows.")

(defvar-local midfill-server--opened nil
  "The connection that knows this buffer's document.")

(defvar-local midfill-server--uri nil
  "URI of this buffer's document.")

(defvar-local midfill-server--version 0
  "The document's version.")

(defvar-local midfill-server--changes nil
  "Edits that have not been sent to the server, last one first.
The value t means that the whole text has to be sent.")

(defvar-local midfill-server--anchor '(1 . 0)
  "A line's first position, and the number of lines above it.
No text before it has changed since it was computed.")

(defvar-local midfill-server--size 0
  "Size of the buffer according to the edits that were noted.")

;;; Documents of the separate server

(defun midfill-server--column (pos)
  "Return the column of POS in its line, in UTF-16 code units."
  (save-excursion
    (goto-char pos)
    (let* ((start (line-beginning-position))
           (column (- pos start)))
      (goto-char start)
      (while (re-search-forward "[\U00010000-\U0010FFFF]" pos t)
        (cl-incf column))
      column)))

(defun midfill-server--line (pos)
  "Return the number of lines above that of POS, counting from the anchor."
  (save-restriction
    (widen)
    (unless (<= (car midfill-server--anchor) pos)
      (setq midfill-server--anchor '(1 . 0)))
    (narrow-to-region (car midfill-server--anchor) (point-max))
    (let ((line (+ (cdr midfill-server--anchor) (line-number-at-pos pos) -1)))
      (setq midfill-server--anchor
            (cons (save-excursion (goto-char pos) (line-beginning-position)) line))
      line)))

(defun midfill-server--position (pos)
  "Return POS as a position of the protocol."
  (save-restriction
    (widen)
    (list :line (midfill-server--line pos) :character (midfill-server--column pos))))

(defun midfill-server--text (start end)
  "Return the text from START to END, with U+FFFD for invalid bytes."
  (save-restriction
    (widen)
    (replace-regexp-in-string
     "[^\x00-\U0010FFFF]" "\uFFFD" (buffer-substring-no-properties start end) t t)))

(defun midfill-server--uri-of-file (file)
  "Return the URI of FILE."
  (concat "file://" (url-hexify-string (expand-file-name file) url-path-allowed-chars)))

(defun midfill-server--buffer-uri ()
  "Return the URI of this buffer."
  (if (and buffer-file-name (not (file-remote-p buffer-file-name)))
      (midfill-server--uri-of-file (file-truename buffer-file-name))
    (concat "untitled:" (url-hexify-string (buffer-name)))))

(defun midfill-server--language ()
  "Return the language identifier of this buffer."
  (or (alist-get major-mode midfill-server--languages)
      (replace-regexp-in-string "\\(?:-ts\\)?-mode\\'" "" (symbol-name major-mode))))

(defun midfill-server--before-change (start end)
  "Note the range from START to END, which is about to be edited."
  (unless (eq midfill-server--changes t)
    ;; The end comes first: the beginning's line is where the next count begins.
    (let* ((last (midfill-server--position end))
           (first (if (= start end) last (midfill-server--position start))))
      (push (list :start start :length (- end start) :range (list :start first :end last))
            midfill-server--changes)))
  (when (< start (car midfill-server--anchor))
    (setq midfill-server--anchor '(1 . 0))))

(defun midfill-server--after-change (start end length)
  "Note that START to END is the new text of LENGTH characters."
  (cl-incf midfill-server--size (- end start length))
  (unless (eq midfill-server--changes t)
    (let ((change (car midfill-server--changes)))
      (if (and change (not (plist-member change :text))
               (= start (plist-get change :start))
               (= length (plist-get change :length)))
          (setcar midfill-server--changes
                  (append change (list :text (midfill-server--text start end))))
        ;; Some functions announce a larger change than they make.
        (setq midfill-server--changes t)))))

(defun midfill-server--content-changes ()
  "Return the edits for `textDocument/didChange'; nil if there are none."
  (cond
   ((or (eq midfill-server--changes t)
        (/= midfill-server--size (buffer-size))
        (cl-notevery (lambda (change) (plist-member change :text)) midfill-server--changes))
    (setq midfill-server--anchor '(1 . 0))
    (vector (list :text (midfill-server--text 1 (1+ (buffer-size))))))
   (midfill-server--changes
    (vconcat (mapcar (lambda (change)
                       (list :range (plist-get change :range) :text (plist-get change :text)))
                     (reverse midfill-server--changes))))))

(defun midfill-server--flush ()
  "Send the edits of this buffer to the separate server."
  (when-let ((changes (midfill-server--content-changes)))
    (setq midfill-server--changes nil
          midfill-server--size (buffer-size))
    (jsonrpc-notify midfill-server--opened :textDocument/didChange
                    (list :textDocument (list :uri midfill-server--uri
                                              :version (cl-incf midfill-server--version))
                          :contentChanges changes))))

(defun midfill-server--add-folder ()
  "Send the project folder of this buffer to the server."
  (when-let* ((project (and buffer-file-name
                            (not (file-remote-p buffer-file-name))
                            (project-current)))
              (root (if (fboundp 'project-root)
                        (project-root project)
                      (car (with-no-warnings (project-roots project)))))
              (uri (directory-file-name (midfill-server--uri-of-file root))))
    (unless (member uri midfill-server--folders)
      (push uri midfill-server--folders)
      (jsonrpc-notify
       midfill-server--own :workspace/didChangeWorkspaceFolders
       (list :event (list :added (vector (list :uri uri :name (file-name-nondirectory
                                                               (directory-file-name root))))
                          :removed []))))))

(defun midfill-server--open ()
  "Open this buffer in the separate server."
  (midfill-server--add-folder)
  (setq midfill-server--opened midfill-server--own
        midfill-server--uri (midfill-server--buffer-uri)
        midfill-server--changes nil
        midfill-server--anchor '(1 . 0)
        midfill-server--size (buffer-size))
  (add-hook 'before-change-functions #'midfill-server--before-change nil t)
  (add-hook 'after-change-functions #'midfill-server--after-change nil t)
  (add-hook 'after-save-hook #'midfill-server--saved nil t)
  (add-hook 'kill-buffer-hook #'midfill-server-detach nil t)
  (add-hook 'change-major-mode-hook #'midfill-server-detach nil t)
  (add-hook 'after-set-visited-file-name-hook #'midfill-server--renamed nil t)
  (jsonrpc-notify midfill-server--own :textDocument/didOpen
                  (list :textDocument
                        (list :uri midfill-server--uri :languageId (midfill-server--language)
                              :version (cl-incf midfill-server--version)
                              :text (midfill-server--text 1 (1+ (buffer-size)))))))

(defun midfill-server--saved ()
  "Notify the server that this buffer was saved."
  (when (midfill-server-connection)
    (midfill-server--flush)
    (jsonrpc-notify midfill-server--opened :textDocument/didSave
                    (list :textDocument (list :uri midfill-server--uri)))))

(defun midfill-server--renamed ()
  "Open this buffer under its new name."
  (midfill-server-detach)
  (midfill-server-attach))

;;; The separate process

(defun midfill-server--notified (connection method params)
  "Handle the notification METHOD with PARAMS from CONNECTION."
  (when (eq connection midfill-server--own)
    (pcase method
      ('$/progress (midfill-server--progressed params))
      ('window/showMessage (message "%s" (plist-get params :message))))))

(defun midfill-server--progressed (params)
  "Follow the loading of the model by PARAMS of `$/progress'."
  (pcase (midfill-server-get params :value :kind)
    ("end"
     (setq midfill-server-percentage nil
           midfill-server-state (if (equal (midfill-server-get params :value :message) "failed") 'failed 'ready))
     (when (eq midfill-server-state 'ready)
       (run-hooks 'midfill-server-ready-hook)))
    (kind
     (let ((title (midfill-server-get params :value :title)))
       (when (and (equal kind "begin") (stringp title) (string-prefix-p "midfill: " title))
         (setq midfill-server-model (substring title (length "midfill: ")))))
     (setq midfill-server-state 'loading
           midfill-server-percentage (or (midfill-server-get params :value :percentage)
                                         midfill-server-percentage))))
  (force-mode-line-update t))

(defun midfill-server--ended (connection)
  "Restart the server after CONNECTION was lost, unless it crashes too often."
  (when (eq connection midfill-server--own)
    (setq midfill-server--own nil
          midfill-server-percentage nil
          midfill-server-state 'stopped)
    (run-hooks 'midfill-server-gone-hook)
    (when (> (- (float-time) midfill-server--started) midfill-server--recovered)
      (setq midfill-server--deaths 0))
    (let* ((process (jsonrpc--process connection))
           (how (format (if (eq (process-status process) 'signal) "signal %d" "status %d")
                        (process-exit-status process)))
           (pause (nth midfill-server--deaths midfill-server--pauses)))
      (cl-incf midfill-server--deaths)
      (cond
       ((null pause)
        (setq midfill-server-state 'given-up)
        (message "midfill: the server crashed again (%s) and stays off; M-x midfill-log may show why, M-x midfill-restart restarts it" how))
       (t
        (setq midfill-server-state 'restarting)
        (when (= midfill-server--deaths 1)
          (message "midfill: the server crashed (%s) and is being restarted; M-x midfill-log may show why" how))
        (run-with-timer pause nil #'midfill-server--revive))))
    (force-mode-line-update t)))

(defun midfill-server--revive ()
  "Restart the server after a crash."
  (when (eq midfill-server-state 'restarting)
    (midfill-server--attach-all)))

(defun midfill-server--attach-all ()
  "Attach all buffers in which `midfill-mode' is on."
  (dolist (buffer (buffer-list))
    (with-current-buffer buffer
      (when (bound-and-true-p midfill-mode)
        (midfill-server-attach)))))

(defconst midfill-server--capabilities
  '(:general (:positionEncodings ["utf-16"])
    :window (:workDoneProgress t)
    :workspace (:workspaceFolders t)
    :textDocument (:synchronization (:didSave t)
                   :completion (:completionItem (:snippetSupport :json-false))
                   :inlineCompletion (:dynamicRegistration :json-false)))
  "The capabilities of this client.")

(defconst midfill-server--here
  (file-name-directory (expand-file-name (or load-file-name buffer-file-name default-directory)))
  "The folder of this package.")

(defun midfill-server--program (name)
  "Return the absolute path of the program NAME; nil if there is none.
The folder of the current buffer may be an untrusted repository, so
relative folders of the variable `exec-path' are ignored."
  (let ((default-directory midfill-server--here)
        (exec-path (cl-remove-if-not (lambda (folder) (and folder (file-name-absolute-p folder)))
                                     exec-path)))
    (when (or (file-name-absolute-p name) (not (file-name-directory name)))
      (executable-find name))))

(defun midfill-server--environment ()
  "Return the environment of the server.
It keeps Python from importing from the current folder."
  (cons "PYTHONSAFEPATH=1" process-environment))

(defun midfill-server--install ()
  "Return the command to install the server, for messages.
It names the repository if this package is inside one."
  (let ((checkout (expand-file-name "../../" midfill-server--here)))
    (if (file-exists-p (expand-file-name "pyproject.toml" checkout))
        (concat "pip install " (shell-quote-argument (directory-file-name checkout)))
      "run `pip install .' in a checkout of its repository")))

(defun midfill-server--process ()
  "Start the program `midfill-command'."
  ;; In the folder of this package: it is local, and the process cannot import from a folder of the user.
  (let ((default-directory midfill-server--here)
        (process-environment (midfill-server--environment))
        (command (cons (midfill-server--program (car midfill-command)) (cdr midfill-command))))
    (make-process :name "midfill" :command command :connection-type 'pipe
                  :coding 'utf-8-emacs-unix :noquery t
                  ;; jsonrpc looks for the buffer by this name.
                  :stderr (get-buffer-create "*midfill stderr*"))))

(defun midfill-server--start ()
  "Start the separate server."
  (setq midfill-server-state 'starting
        midfill-server--initialized nil
        midfill-server--folders nil
        midfill-server--started (float-time)
        midfill-server--own
        (apply #'make-instance 'jsonrpc-process-connection
               :name "midfill"
               :process #'midfill-server--process
               ;; Answer any other request of the server with an error.
               :request-dispatcher
               (lambda (_connection method _params)
                 (unless (eq method 'window/workDoneProgress/create)
                   (jsonrpc-error :code -32601 :message "Unknown method")))
               :notification-dispatcher #'midfill-server--notified
               :on-shutdown #'midfill-server--ended
               ;; Source text is not logged.
               (if (slot-exists-p 'jsonrpc-connection '-events-buffer-config)
                   '(:events-buffer-config (:size 0 :format full))
                 '(:events-buffer-scrollback-size 0))))
  (let ((connection midfill-server--own))
    (jsonrpc-async-request
     connection :initialize
     (list :processId (emacs-pid) :clientInfo (list :name "Emacs" :version emacs-version)
           :rootUri nil :capabilities midfill-server--capabilities
           :initializationOptions (or midfill-settings (make-hash-table)))
     :timeout 60
     :success-fn
     (lambda (result)
       (when (eq connection midfill-server--own)
         (setq midfill-server--initialized t
               midfill-server-version (plist-get (plist-get result :serverInfo) :version))
         (jsonrpc-notify connection :initialized (make-hash-table))
         (midfill-server--attach-all)))
     :error-fn
     (lambda (failure)
       ;; A crash is handled by `midfill-server--ended'.
       (when (and (eq connection midfill-server--own) (jsonrpc-running-p connection))
         (setq midfill-server-state 'failed)
         (message "midfill: the server cannot start: %s" (plist-get failure :message)))))))

(defun midfill-server--attach-own ()
  "Attach this buffer to the separate server; start it if none is running."
  (let ((program (car midfill-command)))
    (cond
     ((eq midfill-server-state 'given-up))
     ((and midfill-server--own midfill-server--initialized)
      (unless (eq midfill-server--opened midfill-server--own)
        (midfill-server--open)))
     (midfill-server--own)
     ((and program (midfill-server--program program)) (midfill-server--start))
     ((not (eq midfill-server-state 'missing))
      (setq midfill-server-state 'missing)
      (message "midfill: cannot run %S; install the server (%s), or set `midfill-command'"
               program (midfill-server--install))))))

;;; lsp-mode

(defvar midfill-server--is-registered nil
  "Non-nil if midfill is registered with lsp-mode.")

(defun midfill-server--register ()
  "Register midfill with lsp-mode, as a server beside the language's own."
  (unless midfill-server--is-registered
    (unless (require 'lsp-mode nil t)
      (user-error "Package lsp-mode is not installed; install it, or set `midfill-client' to `own'"))
    (lsp-register-client
     (make-lsp-client
      :notification-handlers
      (let ((handlers (make-hash-table :test #'equal)))
        (puthash "$/progress"
                 (lambda (workspace params)
                   (lsp-on-progress-modeline workspace params)
                   (midfill-server--progressed params))
                 handlers)
        handlers)
      :new-connection (lsp-stdio-connection (lambda () midfill-command))
      :environment-fn (lambda () '(("PYTHONSAFEPATH" . "1")))
      :activation-fn (lambda (&rest _) (bound-and-true-p midfill-mode))
      :initialization-options (lambda () (or midfill-settings (make-hash-table)))
      :add-on? t :multi-root t :priority -9 :server-id 'midfill))
    (setq midfill-server--is-registered t)))

;;; All kinds of connection

(defun midfill-server-attach ()
  "Attach this buffer to the server."
  (pcase midfill-client
    ('own (midfill-server--attach-own))
    ('lsp-mode (midfill-server--register))))

(defun midfill-server-detach ()
  "Detach this buffer from the separate server."
  (when midfill-server--opened
    (when (and (eq midfill-server--opened midfill-server--own)
               (jsonrpc-running-p midfill-server--own))
      (jsonrpc-notify midfill-server--opened :textDocument/didClose
                      (list :textDocument (list :uri midfill-server--uri))))
    (setq midfill-server--opened nil)
    (remove-hook 'before-change-functions #'midfill-server--before-change t)
    (remove-hook 'after-change-functions #'midfill-server--after-change t)
    (remove-hook 'after-save-hook #'midfill-server--saved t)
    (remove-hook 'kill-buffer-hook #'midfill-server-detach t)
    (remove-hook 'change-major-mode-hook #'midfill-server-detach t)
    (remove-hook 'after-set-visited-file-name-hook #'midfill-server--renamed t)))

(defun midfill-server-connection ()
  "Return the connection of this buffer; nil if there is none."
  (pcase midfill-client
    ('own (and midfill-server--own
               (eq midfill-server--opened midfill-server--own)
               (jsonrpc-running-p midfill-server--own)
               midfill-server--own))
    ('eglot (when-let ((server (and (fboundp 'eglot-current-server) (eglot-current-server))))
              (and (jsonrpc-running-p server)
                   (plist-member (eglot--capabilities server) :inlineCompletionProvider)
                   server)))
    ('lsp-mode (and (bound-and-true-p lsp-mode)
                    buffer-file-name
                    (when-let ((workspace (lsp-find-workspace 'midfill buffer-file-name)))
                      (and (eq (lsp--workspace-status workspace) 'initialized)
                           workspace))))))

(defun midfill-server-position-params ()
  "Return this buffer and point as parameters of the protocol."
  (pcase midfill-client
    ('own (list :textDocument (list :uri midfill-server--uri)
                :position (midfill-server--position (point))))
    ('eglot (eglot--TextDocumentPositionParams))
    (_ (lsp--text-document-position-params))))

(defun midfill-server-get (object &rest keys)
  "Return the member of the JSON OBJECT at the path KEYS.
lsp-mode reads objects as hash tables, the others as property lists."
  (dolist (key keys object)
    (setq object (cond
                  ((integerp key) (and (> (length object) key) (elt object key)))
                  ((hash-table-p object) (gethash (substring (symbol-name key) 1) object))
                  ((consp object) (plist-get object key))))))

(defun midfill-server-request (connection method params done)
  "Send METHOD with PARAMS to CONNECTION; return a handle for cancelling.
DONE is called with the result, or with nil if there is none."
  (if (eq midfill-client 'lsp-mode)
      (let ((lsp--cur-workspace connection)
            (token (make-symbol "midfill")))
        (lsp-request-async (substring (symbol-name method) 1) params done :mode 'alive :cancel-token token
                           :error-handler (lambda (&rest _) (funcall done nil)))
        token)
    (midfill-server-flush connection)
    ;; The public function does not return the id that a cancellation needs.
    (car (jsonrpc--async-request-1 connection method params :success-fn done :timeout 60
                                   :timeout-fn #'ignore
                                   :error-fn (lambda (&rest _) (funcall done nil))))))

(defun midfill-server-flush (connection)
  "Send the edits of this buffer to CONNECTION."
  (cond
   ((eq connection midfill-server--opened) (midfill-server--flush))
   ((eq midfill-client 'eglot) (eglot--signal-textDocument/didChange))))

(defun midfill-server-notify (connection method params)
  "Send the notification METHOD with PARAMS to CONNECTION."
  (if (eq midfill-client 'lsp-mode)
      (let ((lsp--cur-workspace connection))
        (lsp-notify (substring (symbol-name method) 1) params))
    (jsonrpc-notify connection method params)))

(defun midfill-server-cancel (connection id)
  "Cancel the request ID of CONNECTION."
  (cond
   ((symbolp id) (lsp-cancel-request-by-token id))
   ((jsonrpc-running-p connection)
    (jsonrpc-notify connection :$/cancelRequest (list :id id)))))

(defun midfill-server-restart ()
  "Restart the server."
  (pcase midfill-client
    ('own
     (let ((old midfill-server--own))
       (setq midfill-server--deaths 0
             midfill-server--own nil
             midfill-server-state 'stopped)
       (run-hooks 'midfill-server-gone-hook)
       (when old
         ;; The server ends when its input is closed.
         (ignore-errors (process-send-eof (jsonrpc--process old)))
         (jsonrpc-shutdown old))
       (midfill-server--attach-all)))
    ('eglot
     (let ((server (eglot-current-server)))
       (if server (eglot-reconnect server) (eglot-ensure))))
    ('lsp-mode
     (let ((workspace (midfill-server-connection)))
       (if workspace (lsp-workspace-restart workspace) (lsp))))))

(provide 'midfill-server)
;;; midfill-server.el ends here
