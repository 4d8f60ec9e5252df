"""One file a pass, one public function a file: from graph module to graph module, pure."""
