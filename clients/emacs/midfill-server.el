;;; midfill-server.el --- Who talks to midfill's server  -*- lexical-binding: t -*-

;; Copyright the midfill authors
;; SPDX-License-Identifier: Apache-2.0

;; Author: The midfill authors

;;; Commentary:

;; Ghost text needs a connection to a server that knows the buffer's text.  There are three kinds of it
;; (`midfill-client'):
;;
;; - `own': a process of our own, one for all buffers, so that the model is in memory once.  It stands
;;   beside whatever Eglot or lsp-mode run in the buffer; Eglot itself has room for one server only.
;; - `eglot': the server that Eglot runs for the buffer, if it offers inline completion.
;; - `lsp-mode': an add-on client that is registered with lsp-mode.
;;
;; This file knows processes, documents and messages; it knows nothing of what is shown.

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
  "Who talks to the server.
A change takes effect in buffers where `midfill-mode' is switched on
after it."
  :type '(choice (const :tag "A process of its own, beside Eglot and lsp-mode" own)
                 (const :tag "Eglot, where midfill is the buffer's server" eglot)
                 (const :tag "lsp-mode, as an add-on server" lsp-mode)))

(defcustom midfill-command '("midfill" "serve")
  "The program that starts the server, and its arguments.
A name is looked for on the variable `exec-path', but not in its relative
folders.  The server is started in the package's own folder."
  :type '(repeat string)
  :risky t)

(defcustom midfill-settings nil
  "Settings of the server, as a property list.
The names are those of server/docs/settings.md, as keywords; false is
`:json-false'.  For example: (:eagerness \"low\" :prefetch :json-false)"
  :type '(plist :key-type symbol)
  :risky t)

(defconst midfill-server--pauses '(0.25 1 4)
  "Seconds before a dead server is started again; then it is given up.")

(defconst midfill-server--recovered 600
  "Having lived for so many seconds, a server has recovered.")

(defconst midfill-server--languages
  '((c++-mode . "cpp") (c++-ts-mode . "cpp") (sh-mode . "shellscript") (bash-ts-mode . "shellscript")
    (js-jsx-mode . "javascriptreact") (tsx-ts-mode . "typescriptreact") (mhtml-mode . "html")
    (latex-mode . "latex") (LaTeX-mode . "latex") (cperl-mode . "perl") (enh-ruby-mode . "ruby")
    (js2-mode . "javascript") (csharp-mode . "csharp") (tuareg-mode . "ocaml") (conf-toml-mode . "toml"))
  "Language identifiers that are not the major mode's name.")

(defvar midfill-server-state 'stopped
  "What the server does, as far as it tells us: that of our own, or lsp-mode's.
One of `stopped', `missing', `starting', `loading', `ready', `failed',
`restarting' and `given-up'.")

(defvar midfill-server-percentage nil
  "How much of the model is loaded, in per cent; nil if not known.")

(defvar midfill-server-model nil
  "Name of the model, if known.")

(defvar midfill-server-version nil
  "Version of the server, if known.")

(defvar midfill-server-ready-hook nil
  "Run when suggestions can be had.")

(defvar midfill-server-gone-hook nil
  "Run when the connection is lost.")

(defvar midfill-server--own nil
  "The connection to the server of our own.")

(defvar midfill-server--initialized nil
  "Whether `midfill-server--own' has answered `initialize'.")

(defvar midfill-server--started 0.0
  "When it was started, in seconds.")

(defvar midfill-server--deaths 0
  "How often it has died lately.")

(defvar midfill-server--folders nil
  "URIs of the folders that it knows.")

(defvar-local midfill-server--opened nil
  "The connection that knows this buffer's document.")

(defvar-local midfill-server--uri nil
  "Under which name it knows that.")

(defvar-local midfill-server--version 0
  "The document's version.")

(defvar-local midfill-server--changes nil
  "Edits that the server has not been told of, last one first.
t where they cannot be told one by one.")

(defvar-local midfill-server--anchor '(1 . 0)
  "The beginning of a line, and how many lines stand above it.
No text before it has changed since it was found.")

(defvar-local midfill-server--size 0
  "How large the buffer is, by the edits that we were told of.")

;;; Documents of our own server

(defun midfill-server--column (pos)
  "Column of POS in its line, in UTF-16 code units."
  (save-excursion
    (goto-char pos)
    (let* ((start (line-beginning-position))
           (column (- pos start)))
      (goto-char start)
      (while (re-search-forward "[\U00010000-\U0010FFFF]" pos t)
        (cl-incf column))
      column)))

(defun midfill-server--line (pos)
  "How many lines stand above that of POS, which is counted from the last one on."
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
  "The place POS as the protocol writes it."
  (save-restriction
    (widen)
    (list :line (midfill-server--line pos) :character (midfill-server--column pos))))

(defun midfill-server--text (start end)
  "The text from START to END; bytes that are no characters are U+FFFD."
  (save-restriction
    (widen)
    (replace-regexp-in-string
     "[^\x00-\U0010FFFF]" "\uFFFD" (buffer-substring-no-properties start end) t t)))

(defun midfill-server--uri-of-file (file)
  "The URI of FILE."
  (concat "file://" (url-hexify-string (expand-file-name file) url-path-allowed-chars)))

(defun midfill-server--buffer-uri ()
  "The URI of this buffer."
  (if (and buffer-file-name (not (file-remote-p buffer-file-name)))
      (midfill-server--uri-of-file (file-truename buffer-file-name))
    (concat "untitled:" (url-hexify-string (buffer-name)))))

(defun midfill-server--language ()
  "The language identifier of this buffer."
  (or (alist-get major-mode midfill-server--languages)
      (replace-regexp-in-string "\\(?:-ts\\)?-mode\\'" "" (symbol-name major-mode))))

(defun midfill-server--before-change (start end)
  "Note where the text from START to END is, which is about to be changed."
  (unless (eq midfill-server--changes t)
    ;; The end comes first: the beginning's line is where the next count begins.
    (let* ((last (midfill-server--position end))
           (first (if (= start end) last (midfill-server--position start))))
      (push (list :start start :length (- end start) :range (list :start first :end last))
            midfill-server--changes)))
  (when (< start (car midfill-server--anchor))
    (setq midfill-server--anchor '(1 . 0))))

(defun midfill-server--after-change (start end length)
  "Note what stands from START to END now, where LENGTH characters were."
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
  "The edits, as `textDocument/didChange' has them; nil if there are none."
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
  "Send the edits of this buffer to the server of our own."
  (when-let ((changes (midfill-server--content-changes)))
    (setq midfill-server--changes nil
          midfill-server--size (buffer-size))
    (jsonrpc-notify midfill-server--opened :textDocument/didChange
                    (list :textDocument (list :uri midfill-server--uri
                                              :version (cl-incf midfill-server--version))
                          :contentChanges changes))))

(defun midfill-server--add-folder ()
  "Tell the server of the project that this buffer belongs to."
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
  "Give this buffer to the server of our own."
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
  "Tell the server that this buffer was saved."
  (when (midfill-server-connection)
    (midfill-server--flush)
    (jsonrpc-notify midfill-server--opened :textDocument/didSave
                    (list :textDocument (list :uri midfill-server--uri)))))

(defun midfill-server--renamed ()
  "Open this buffer under its new name."
  (midfill-server-detach)
  (midfill-server-attach))

;;; The process of our own

(defun midfill-server--notified (connection method params)
  "Take the notification METHOD with PARAMS of CONNECTION."
  (when (eq connection midfill-server--own)
    (pcase method
      ('$/progress (midfill-server--progressed params))
      ('window/showMessage (message "%s" (plist-get params :message))))))

(defun midfill-server--progressed (params)
  "Follow the loading of the model; PARAMS are those of `$/progress'."
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
  "CONNECTION is lost: start another server, if that has hope."
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
        (message "midfill: the server ended again (%s) and stays off; M-x midfill-log may say why, M-x midfill-restart starts it" how))
       (t
        (setq midfill-server-state 'restarting)
        (when (= midfill-server--deaths 1)
          (message "midfill: the server ended (%s) and is started again; M-x midfill-log may say why" how))
        (run-with-timer pause nil #'midfill-server--revive))))
    (force-mode-line-update t)))

(defun midfill-server--revive ()
  "Start the server again after its death."
  (when (eq midfill-server-state 'restarting)
    (midfill-server--attach-all)))

(defun midfill-server--attach-all ()
  "Serve all buffers that want it."
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
  "What our own client can do.")

(defconst midfill-server--here
  (file-name-directory (expand-file-name (or load-file-name buffer-file-name default-directory)))
  "The folder of this package.")

(defun midfill-server--program (name)
  "The absolute path of the program NAME; nil if there is none.
The folder of the current buffer may be a stranger's repository, so
relative folders of the variable `exec-path' do not count."
  (let ((default-directory midfill-server--here)
        (exec-path (cl-remove-if-not (lambda (folder) (and folder (file-name-absolute-p folder)))
                                     exec-path)))
    (when (or (file-name-absolute-p name) (not (file-name-directory name)))
      (executable-find name))))

(defun midfill-server--environment ()
  "The environment of the server.
Python imports nothing from the current folder."
  (cons "PYTHONSAFEPATH=1" process-environment))

(defun midfill-server--install ()
  "The way to get the server, for messages.
What is beside this package can be installed."
  (let ((checkout (expand-file-name "../../" midfill-server--here)))
    (if (file-exists-p (expand-file-name "pyproject.toml" checkout))
        (concat "pip install " (shell-quote-argument (directory-file-name checkout)))
      "pip install . in a checkout of its repository")))

(defun midfill-server--process ()
  "Start the program `midfill-command'."
  ;; In a folder of ours: the process holds none of the user's, is a local one, and imports nothing by chance.
  (let ((default-directory midfill-server--here)
        (process-environment (midfill-server--environment))
        (command (cons (midfill-server--program (car midfill-command)) (cdr midfill-command))))
    (make-process :name "midfill" :command command :connection-type 'pipe
                  :coding 'utf-8-emacs-unix :noquery t
                  ;; jsonrpc looks for the buffer by this name.
                  :stderr (get-buffer-create "*midfill stderr*"))))

(defun midfill-server--start ()
  "Start the server of our own."
  (setq midfill-server-state 'starting
        midfill-server--initialized nil
        midfill-server--folders nil
        midfill-server--started (float-time)
        midfill-server--own
        (apply #'make-instance 'jsonrpc-process-connection
               :name "midfill"
               :process #'midfill-server--process
               ;; A request that is not known is an error, and nothing else is asked for.
               :request-dispatcher
               (lambda (_connection method _params)
                 (unless (eq method 'window/workDoneProgress/create)
                   (jsonrpc-error :code -32601 :message "Not known here")))
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
       ;; A server that has died is another matter.
       (when (and (eq connection midfill-server--own) (jsonrpc-running-p connection))
         (setq midfill-server-state 'failed)
         (message "midfill: the server cannot start: %s" (plist-get failure :message)))))))

(defun midfill-server--attach-own ()
  "Serve this buffer with the server of our own; start one where there is none."
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
      (message "midfill: cannot run %S; install the server (%s), or name it in `midfill-command'"
               program (midfill-server--install))))))

;;; lsp-mode

(defvar midfill-server--is-registered nil
  "Whether lsp-mode knows of us.")

(defun midfill-server--register ()
  "Make midfill known to lsp-mode, as a server beside the language's own."
  (unless midfill-server--is-registered
    (unless (require 'lsp-mode nil t)
      (user-error "Not installed: lsp-mode; `midfill-client' can be `own'"))
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
  "Have this buffer served."
  (pcase midfill-client
    ('own (midfill-server--attach-own))
    ('lsp-mode (midfill-server--register))))

(defun midfill-server-detach ()
  "Take this buffer away from the server of our own."
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
  "The connection that serves this buffer; nil if there is none."
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
  "This buffer and point, as the protocol writes them."
  (pcase midfill-client
    ('own (list :textDocument (list :uri midfill-server--uri)
                :position (midfill-server--position (point))))
    ('eglot (eglot--TextDocumentPositionParams))
    (_ (lsp--text-document-position-params))))

(defun midfill-server-get (object &rest keys)
  "The member of the JSON OBJECT that KEYS lead to.
lsp-mode reads objects as hash tables, the others as property lists."
  (dolist (key keys object)
    (setq object (cond
                  ((integerp key) (and (> (length object) key) (elt object key)))
                  ((hash-table-p object) (gethash (substring (symbol-name key) 1) object))
                  ((consp object) (plist-get object key))))))

(defun midfill-server-request (connection method params done)
  "Ask CONNECTION with METHOD and PARAMS; return a handle for cancelling.
DONE is called with the result, or nil if there is none."
  (if (eq midfill-client 'lsp-mode)
      (let ((lsp--cur-workspace connection)
            (token (make-symbol "midfill")))
        (lsp-request-async (substring (symbol-name method) 1) params done :mode 'alive :cancel-token token
                           :error-handler (lambda (&rest _) (funcall done nil)))
        token)
    (midfill-server-flush connection)
    ;; The public function does not tell the number that a cancellation has to name.
    (car (jsonrpc--async-request-1 connection method params :success-fn done :timeout 60
                                   :timeout-fn #'ignore
                                   :error-fn (lambda (&rest _) (funcall done nil))))))

(defun midfill-server-flush (connection)
  "Send the edits of this buffer to CONNECTION."
  (cond
   ((eq connection midfill-server--opened) (midfill-server--flush))
   ((eq midfill-client 'eglot) (eglot--signal-textDocument/didChange))))

(defun midfill-server-notify (connection method params)
  "Tell CONNECTION of METHOD with PARAMS."
  (if (eq midfill-client 'lsp-mode)
      (let ((lsp--cur-workspace connection))
        (lsp-notify (substring (symbol-name method) 1) params))
    (jsonrpc-notify connection method params)))

(defun midfill-server-cancel (connection id)
  "Take the request ID of CONNECTION back."
  (cond
   ((symbolp id) (lsp-cancel-request-by-token id))
   ((jsonrpc-running-p connection)
    (jsonrpc-notify connection :$/cancelRequest (list :id id)))))

(defun midfill-server-restart ()
  "Stop the server and start a fresh one."
  (pcase midfill-client
    ('own
     (let ((old midfill-server--own))
       (setq midfill-server--deaths 0
             midfill-server--own nil
             midfill-server-state 'stopped)
       (run-hooks 'midfill-server-gone-hook)
       (when old
         ;; It ends by itself when nobody writes to it any more.
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
